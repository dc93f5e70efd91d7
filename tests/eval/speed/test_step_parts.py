"""Where a step's time goes: every part by its name, in order, of the right length; what makes the host wait."""
import contextlib
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest

from lowbit_video.eval.speed.step import measure, paddle_methods, paddle_side, part_table, parts, waits

BEFORE = ["gates and residuals", "modulation", "norms", "modulation", "norms", "modulation", "gates and residuals"]
ATTENTION = ["joining", *["projections", "attention"] * 3, *["QK norms", "attention"] * 2, "projections", "joining"]
FUSED = ["joining", *["projections", "attention"] * 3, "projections", "joining"]
AFTER = [*BEFORE, "feed-forward", "gates and residuals"]


def of_block(attention):
    """The parts of one block in order, from where the model hands it the tokens to where it gets them back."""
    return [*BEFORE, *attention, *AFTER]


@contextlib.contextmanager
def made(method):
    side = paddle_side.PaddleSide()
    entry = side.entry("cogvideox-2b")
    model, given = side.make(entry, tiny=True)
    with side.methods_of(model, entry, [method], None) as ways:
        yield side, model, side.step(model, given, ways[method])


@pytest.mark.parametrize("method, attention", [("none", ATTENTION), ("int8+fp8 apart", ATTENTION), ("int8+fp8", FUSED)])
def test_a_step_goes_through_its_parts_in_order(method, attention):
    with made(method) as (_, model, step):
        timeline = parts.Timeline(model, lambda: 0, lambda a, b: 1.0, fused=method == "int8+fp8")
        with timeline.watching():
            step()
            once = [part for part, *_ in timeline._marks]
            step()
        assert [part for part, *_ in timeline._marks] == once  # the step before is forgotten
        step()
        assert [part for part, *_ in timeline._marks] == once  # no hook is left
        begin, end = once.index("gates and residuals"), len(once) - once[::-1].index("gates and residuals")
        assert once[begin:end] == [*of_block(attention), "gates and residuals", *of_block(attention)]
        assert set(once[:begin]) == {"embeddings"} and set(once[end:]) == {"final", ""} and once[-1] == ""
        found = timeline.parts()
        assert {part: one["calls"] for part, one in found.items()} == {part: once.count(part) for part in parts.PARTS
                                                                         if part in once}
        assert all(one["ms"] == one["calls"] for one in found.values())  # each lasts 1 by that clock
        assert sum(one["calls"] for one in found.values()) == len(once) - 1


def test_time_belongs_to_the_part_in_which_it_passes():
    clock = [0.0]

    def slow(layer, ms):
        own = layer.forward

        def forward(*given, **named):
            clock[0] += ms
            return own(*given, **named)

        layer.forward = forward

    with made("none") as (_, model, step):
        for block in model.transformer_blocks:
            for layer, ms in ((block.ff, 1.0), (block.attn1.to_v, 10.0), (block.attn1.to_out[0], 20.0),
                              (block.norm2.norm, 100.0), (block.norm1.linear, 1000.0), (block.attn1.norm_q, 1e4)):
                slow(layer, ms)
        slow(model.patch_embed, 1e5)
        slow(model.norm_out, 1e6)
        slow(model.proj_out, 2e6)

        def attend(self, q, k, v):
            clock[0] += 1e7
            return q

        timeline = parts.Timeline(model, lambda: clock[0], lambda a, b: b - a, fused=False)
        with pytest.MonkeyPatch.context() as patch, timeline.watching():
            patch.setattr(paddle_methods.NoAttention, "attend", attend)
            step()
    assert {part: one["ms"] for part, one in timeline.parts().items() if one["ms"]} == {
        "embeddings": 1e5, "norms": 400.0, "modulation": 2000.0, "projections": 60.0, "QK norms": 2e4, "attention": 2e7,
        "feed-forward": 2.0, "final": 3e6}


def test_a_profile_adds_up_and_is_of_eager_steps_only(monkeypatch):
    run = lambda **more: measure.measure(paddle_side.PaddleSide(), "cogvideox-2b", ["exact", "none"], ["eager"], True, 1.0,
                                         lambda text: None, lambda result: None, **more)
    result = run(profile=True)
    assert not result["failed"] and [one["method"] for one in result["profiles"]] == ["exact", "none"]
    for one in result["profiles"]:
        assert one["marked_ms"] == pytest.approx(sum(part["ms"] for part in one["parts"].values())) and one["marked_ms"] > 0
        assert set(one["parts"]) == set(parts.PARTS) and one["host_ms"] > one["host_blocks_ms"] / 2 > 0  # one of 2
        assert one["waits"]["on the CPU"] is None  # a CPU lacks no kernel that it could tell of
    exact, none = (one["waits"]["reads"] for one in result["profiles"])
    assert "numpy" not in none and exact["numpy"] >= 6  # on a CPU the reference reads q, k and v of 2 modules
    assert "profiles" not in run()

    def broken(*given, **named):
        raise RuntimeError("no event")

    monkeypatch.setattr(parts, "profile", broken)
    result = run(profile=True)
    assert list(result["failed"]) == ["exact, profile", "none, profile"] and len(result["rows"]) == 2


@pytest.mark.parametrize("read, counted", [(float, "numpy"), (int, "numpy"), (bool, "numpy"), (np.asarray, "numpy"),
                                           (lambda t: t.item(), "item"), (lambda t: t.tolist(), "numpy"),
                                           (lambda t: t.cpu(), "cpu")])
def test_reads_on_the_host_are_counted(read, counted):
    tensor, before = paddle.ones([1]), paddle.Tensor.numpy
    assert waits.reads_of(lambda: (read(tensor), read(tensor)))[counted] == 2
    assert waits.reads_of(lambda: tensor + tensor) == {} and paddle.Tensor.numpy is before
    assert waits.reads_of(lambda: paddle.to_tensor([1.0])) == {"to_tensor": 1}


def test_operators_that_run_on_the_cpu_are_counted_where_paddle_tells(monkeypatch):
    """The text is that of Paddle 3.3.1 on a device that lacks the operators."""
    line = "I1 kernel_factory.cc:270] missing cudev kernel: {}, expected_kernel_key:(cudev, NCHW, float32), {} to CPU one!\n"
    told = [line.format("gaussian", "fallbacking"), line.format("argsort", "fallback") + line.format("topk", "fallbacking") * 2]
    monkeypatch.setattr(waits, "logged", lambda call: told.pop(0))
    assert waits.fallbacks_of(lambda: None) == {"argsort": 1, "topk": 2}
    told[:] = ["", line.format("argsort", "fallback")]
    assert waits.fallbacks_of(lambda: None) is None


LOGS = """
import os
import paddle
from lowbit_video.eval.speed.step import waits
file = "dygraph_functions"
waits.prepare(file)
paddle.zeros([2])
assert "Running_C++_API" in waits.logged(lambda: paddle.zeros([2]), file)
paddle.zeros([2])
assert waits.logged(lambda: None, file) == ""
os.write(2, b"the end")
"""


def test_what_paddle_logs_is_caught_and_only_meanwhile():
    heard = {name: value for name, value in os.environ.items() if name != "GLOG_minloglevel"}  # `generate` leaves it set
    run = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, env=heard)
    assert run.returncode == 0 and "Running_C++_API" not in run.stderr and "the end" in run.stderr, run.stderr


def profiled(method, ms, host=1.0, reads=None):
    return dict(method=method, title=method, marked_ms=ms * 2, host_ms=3.0, host_blocks_ms=2.0,
                parts={"norms": dict(ms=ms, host_ms=host, calls=2), "final": dict(ms=ms, host_ms=host, calls=1)},
                waits={"reads": reads, "on the CPU": {}})


def test_the_table_sets_both_frameworks_parts_side_by_side():
    torchs = dict(model="m", framework="torch", profiles=[profiled("exact", 10.0), profiled("fa2", 9.0)])
    paddles = dict(model="m", framework="paddle", profiles=[profiled("exact", 15.0, 2.0, {"numpy": 2, "to_tensor": 1})])
    lines = part_table.profiles([torchs, paddles])
    begin = lines.index("## m: exact")
    assert lines[begin + 2:begin + 8] == ["| part | PyTorch ms | Paddle ms | Paddle / PyTorch | PyTorch host | Paddle host |",
                                          "| --- | --- | --- | --- | --- | --- |",
                                          "| norms | 10.00 | 15.00 | 1.50 | 1.00 | 2.00 |",
                                          "| final | 10.00 | 15.00 | 1.50 | 1.00 | 2.00 |",
                                          "| together | 20.00 | 30.00 | 1.50 | 2.00 | 4.00 |", ""]
    assert any(line.startswith("Paddle: 3.0 ms until a step returns, the blocks' own 2.0; between host and device: 2 numpy, "
                               "1 to_tensor; run on the CPU for the lack of a kernel: none.") for line in lines)
    assert any("between host and device: not told here" in line for line in lines)
    assert "| part | PyTorch ms | PyTorch host |" in lines[lines.index("## m: fa2"):]
    assert part_table.profiles([dict(model="m", framework="torch")]) == []
