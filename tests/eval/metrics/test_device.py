"""Pairs compared by a framework's tensors, several frames at once or one by one: the figures are those of NumPy."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lowbit_video.eval.compare.paired import figures
from lowbit_video.eval.metrics import registry, ssim
from lowbit_video.eval.metrics.shared.context import Context
from lowbit_video.eval.metrics.shared.device import BLOCK, Device, blocks
from lowbit_video.eval.video import BadVideoError, as_uint8, as_unit

spec = importlib.util.spec_from_file_location("eval_make_goldens", Path(__file__).parent / "make_goldens.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)
COMPARED = ("psnr", "ssim", "lpips")
# PyTorch knows the CPU by two names, and only of "cpu" are frames taken one by one.
DEVICES = [pytest.param(Device("torch", "cpu:0"), marks=pytest.mark.torch), Device("paddle", "cpu")]
# What videos taken whole gave, LPIPS by Paddle on a CPU (commit e5c7788), of the pair of 3 x 65 x 83 that is used below.
WHOLE = {"float32": {"psnr": 20.14922148955635, "ssim": 0.3602140908514609, "lpips": 0.17039830144494772},
         "uint8": {"psnr": 20.149155514957837, "ssim": 0.3603307813442542, "lpips": 0.17043959939231476}}
KINDS = {"float32": np.float32, "float64": np.float64, "uint8": as_uint8}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alexnet")
    np.savez(folder / "weights.npz", **maker.seeded_alexnet())
    return {"lpips": str(folder)}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.framework)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("put", [False, True], ids=["arrays", "put"])
def test_figures_are_those_of_numpy(device, kind, put, weights):
    pytest.importorskip(device.framework, reason=f"of torch and Paddle, {device.framework} is not installed")
    pair = [KINDS[kind](frames) for frames in maker.seeded_pair((BLOCK + 3, 65, 83), 0.1)]
    metrics = [registry.metric(name) for name in COMPARED]
    wanted = figures(*pair, metrics, Context(weights=weights))
    there = map(device.put, pair) if put else pair
    found = figures(*there, metrics, Context(weights=weights, device=device))
    for name in COMPARED:
        assert found["figures"][name] == pytest.approx(wanted["figures"][name], rel=1e-12 if name != "lpips" else 1e-6)
    assert found["frames"] == wanted["frames"] and len(found["frames"]["ssim"]) == BLOCK + 3


@pytest.mark.parametrize("kind", WHOLE)
def test_figures_are_those_of_videos_taken_whole(kind, weights):
    pair = [KINDS[kind](frames) for frames in maker.seeded_pair((3, 65, 83), 0.1)]
    found = figures(*pair, [registry.metric(name) for name in COMPARED], Context(weights=weights))["figures"]
    for name, wanted in WHOLE[kind].items():
        assert found[name] == pytest.approx(wanted, rel=1e-13 if name != "lpips" else 1e-6, abs=0)


@pytest.mark.torch
def test_frames_are_taken_together_on_a_gpu_and_one_by_one_on_a_processor():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pair = maker.seeded_pair((BLOCK + 3, 16, 17), 0.1)
    counts = {name: [len(a) for a, b in blocks(*pair, device=where) if a.shape == b.shape]
              for name, where in (("gpu", Device("torch", "cpu:0")), ("cpu", Device("torch", "cpu")), ("numpy", None))}
    assert counts == {"gpu": [BLOCK, 3], "cpu": [1] * (BLOCK + 3), "numpy": [1] * (BLOCK + 3)}


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.framework)
def test_bad_videos_are_named_before_they_go_to_a_device(device):
    pytest.importorskip(device.framework, reason=f"of torch and Paddle, {device.framework} is not installed")
    video = maker.seeded_pair((2, 16, 17), 0.1)[0]
    with pytest.raises(BadVideoError, match="NaN"):
        device.put(np.where(np.arange(3) == 1, np.nan, video))
    with pytest.raises(BadVideoError, match="but reference is"):
        list(blocks(device.put(video), device.put(video[:1]), device))


@pytest.mark.torch
def test_a_torch_device_works_in_whole_float32_and_leaves_everything_as_it_was():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    flags = torch.backends.cudnn
    before = flags.enabled, flags.allow_tf32, torch.is_grad_enabled()
    with Device("torch", "cpu").at_work():
        assert (flags.enabled, flags.allow_tf32, torch.is_grad_enabled()) == (True, False, False)
    assert (flags.enabled, flags.allow_tf32, torch.is_grad_enabled()) == before


def test_a_paddle_device_is_the_current_one_while_it_is_at_work(monkeypatch):
    paddle = pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
    asked = []
    monkeypatch.setattr(paddle, "set_device", asked.append)
    monkeypatch.setattr(paddle, "get_device", lambda: "before")
    with pytest.raises(KeyError), Device("paddle", "there").at_work():
        raise KeyError  # whatever happens
    assert asked == ["there", "before"]


@pytest.mark.parametrize("height", [11, 42, 43, 75])  # windows in height: 1, one strip, one more, two strips and one
def test_ssim_in_strips_is_ssim_of_the_whole_frame_to_the_bit(height):
    frame, reference = maker.seeded_pair((2, height, 23), 0.1)
    whole = [np.mean(one, axis=(1, 2, 3)) for one in ssim.maps(frame, reference)]
    assert all(np.array_equal(*both) for both in zip(ssim.similarity(frame, reference), whole, strict=True))


def test_frames_are_rounded_one_by_one_as_all_at_once():
    video = (np.arange(2 * 9 * 7 * 3).reshape(2, 9, 7, 3) % 511 / 510).astype(np.float32)
    video[0, 0, 0] = -5e-5, 1 + 5e-5, 0.5  # what rounding may carry past the ends
    wanted = np.round(np.clip(video.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    found = as_uint8(video)
    assert found.dtype == np.uint8 and np.array_equal(found, wanted) and found[0, 0, 0].tolist() == [0, 255, 128]
    assert as_uint8(found) is found and (as_unit(video).min(), as_unit(video).max()) == (0, 1)
