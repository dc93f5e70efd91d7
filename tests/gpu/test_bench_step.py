"""`bench step` and `bench video` on a GPU, with small models: clocks and marks, and that nothing waits for the device."""
import argparse

import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def side(gpu):
    if gpu.name == "torch":
        pytest.importorskip("diffusers", reason="needs diffusers")
        from lowbit_video.eval.speed.step.torch_side import TorchSide as Side
    else:
        from lowbit_video.eval.speed.step.paddle_side import PaddleSide as Side
    return Side()


def test_a_step_is_timed_part_by_part_and_nothing_in_it_waits_for_the_device(side):
    from lowbit_video.eval.speed.step.measure import measure

    methods = ["exact", "int8+fp8", "none"]
    result = measure(side, "cogvideox-5b", methods, ["eager"], True, 50.0, print, lambda result: None, True)
    assert not result["failed"] and result["dtype"] == "bfloat16" and side.gpu_name() != "no GPU"
    _, low, none = result["rows"]
    assert low["sqnr_db"] > max(10, none["sqnr_db"]) and all(row["median_ms"] > 0 for row in result["rows"])
    for one in result["profiles"]:
        assert 0 < one["host_blocks_ms"] / 2 < one["host_ms"] and all(part["ms"] >= 0 for part in one["parts"].values())
        assert not set(one["waits"]["reads"]) - {"to_tensor"}, f"{one['method']}: a tensor is read on the host"
        assert not one["waits"]["on the CPU"], f"{one['method']}: operators run on the CPU"


def test_kernels_tell_where_the_devices_time_goes(gpu, side):
    if gpu.name != "torch":
        pytest.skip("Paddle's kernels are not told apart; set LOWBIT_TEST_FRAMEWORK=torch")
    from lowbit_video.eval.speed.step import kernel_parts
    from lowbit_video.eval.speed.step.measure import measure

    result = measure(side, "cogvideox-5b", ["pytorch", "int8+fp8", "none"], ["eager", "blocks"], True, 50.0, print,
                     lambda result: None)
    assert not result["failed"]
    for row in result["rows"]:
        parts, fused = row["parts_ms"], row["method"] == "int8+fp8"
        assert (parts[kernel_parts.ATTENTION] > 0) is (row["method"] != "none") and parts[kernel_parts.PRODUCTS] > 0
        assert (parts[kernel_parts.PROLOGUE] > 0) is row["prologue_whole"] is (row["mode"] == "eager" or fused)
        assert parts[kernel_parts.OTHER] > 0 and sum(parts.values()) >= row["median_ms"] * 0.99


def test_of_slow_steps_every_run_counts(side, monkeypatch):
    from lowbit_video.eval.speed.step import measure

    monkeypatch.setattr(measure, "SLOW_MS", 0.0)
    saved = []
    result = measure.measure(side, "cogvideox-5b", ["exact", "int8+fp8", "none"], ["eager"], True, 0.0, print,
                             lambda result: saved.append([row["runs"] for row in result["rows"]]), rounds=2)
    assert not result["failed"] and [row["runs"] for row in result["rows"]] == [2, 2, 2] and [1, 1] in saved
    assert all(0 < row["median_ms"] < 1e3 for row in result["rows"])


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_video_is_timed_by_stage(gpu, side, low_memory):
    if gpu.name != "paddle":
        pytest.skip("the pipeline is Paddle's; set LOWBIT_TEST_FRAMEWORK=paddle")
    from lowbit_video.eval.speed.video import run

    args = argparse.Namespace(model="2b", precisions=["exact", "int8+fp8"], steps=2, frames=None, height=None, width=None,
                              low_memory=low_memory, tiles=False, tiny=True, recipe=[])
    result = run.measure(args, side.device, print, lambda result: None)
    assert [one.get("failed") for one in result["videos"]] == [None, None] and result["dtype"] == "float16"
    assert all(seconds > 0 for one in result["videos"] for seconds in one["seconds"].values())
    assert (result["videos"][0]["weights_s"]["transformer"] > 0) is low_memory
