"""The experiment that times steps of ppdiffusers' models: what it checks, in which order it times, and what its table says."""
import contextlib
import math

import numpy as np
import paddle
import pytest

from lowbit_video.eval.speed.experiments import ppdiffusers_step as experiment
from lowbit_video.eval.speed.experiments.ppdiffusers_step import NONE, REFERENCE, UNTOUCHED

EXACT = np.random.default_rng(0).standard_normal(1000)
NOISE = np.random.default_rng(1).standard_normal(1000)


class World:
    """A model whose step is EXACT, with the noise of the method that is on; an error where a method has one instead."""

    def __init__(self, ms=None, **noise):
        self.noise, self.on, self.calls, self.timed, self.said = noise, None, [], [], []
        self.ms = ms or {}

    def methods(self):
        return {name.replace("low", "int8+fp8"): lambda name=name: self.put(name) for name in self.noise}

    @contextlib.contextmanager
    def put(self, name):
        assert self.on is None
        self.on = name
        try:
            yield
        finally:
            self.on = None

    def step(self):
        self.calls.append(self.on)
        noise = self.noise[self.on]
        if isinstance(noise, Exception):
            raise noise
        return paddle.to_tensor((EXACT + noise * NOISE).astype(np.float32))

    def once(self, call):
        call()
        self.timed.append(self.on)
        return self.ms.get(self.on, 100.0) + len(self.timed) / 1000

    def summary(self):
        return f"by {self.on}"

    def variants(self):
        return {self.on: 1}

    def measure(self, **more):
        rows = experiment.measure(self.step, self.methods(), self.once, lambda: self, self.said.append, **more)
        return {row["method"]: row for row in rows}


def test_each_method_is_compared_with_exact_attention_and_timed_in_turns():
    world = World(untouched=1e-3, exact=0.0, low=0.1, none=1.0, ms=dict(untouched=400.0, exact=200.0, low=100.0, none=50.0))
    rows = world.measure(rounds=4)
    assert list(rows) == [UNTOUCHED, REFERENCE, "int8+fp8", NONE] and not any("left_out" in row for row in rows.values())
    assert world.calls[:4] == ["exact", "untouched", "low", "none"]
    turn = ["untouched", "exact", "low", "none"]
    assert world.timed == turn + turn[::-1] + turn + turn[::-1]
    found = {name: row["sqnr_db"] for name, row in rows.items()}
    assert found.pop(REFERENCE) == math.inf
    power = 10 * np.log10((EXACT**2).sum() / (NOISE**2).sum())
    assert found == pytest.approx({UNTOUCHED: 60 + power, "int8+fp8": 20 + power, NONE: power}, abs=0.01)
    assert rows["int8+fp8"]["ran"] == {"low": 1} and rows["int8+fp8"]["summary"] == "by low"
    assert "ran" not in rows[UNTOUCHED] and "ran" not in rows[NONE]
    assert rows["int8+fp8"]["runs"] == 4 and rows["int8+fp8"]["low_ms"] <= rows["int8+fp8"]["ms"] <= rows["int8+fp8"]["high_ms"]
    assert {name: row["over_exact"] for name, row in rows.items()} == pytest.approx(
        {UNTOUCHED: 0.5, REFERENCE: 1, "int8+fp8": 2, NONE: 4}, rel=1e-3)
    assert {name: row["attention_share"] for name, row in rows.items()} == pytest.approx(
        {UNTOUCHED: 0.875, REFERENCE: 0.75, "int8+fp8": 0.5, NONE: 0}, abs=1e-3)


def test_only_short_steps_settle_before_they_are_timed():
    world = World(exact=0.0, low=0.1, ms=dict(exact=100.0, low=10.0))
    world.measure(rounds=4)
    assert world.calls.count("exact") == 1 + 1 + 4 and world.calls.count("low") == 1 + 4 + 4


@pytest.mark.parametrize("name, noise, told", [
    ("low", 0.5, "dB beside exact attention, wanted 10"),
    ("untouched", 0.2, "dB beside exact attention, wanted 20"),
    ("low", math.nan, "the prediction is not finite"),
    ("none", 0.1, "dB without attention: the check would miss a wrong one"),
    ("untouched", MemoryError("out of\n memory"), "MemoryError: out of memory"),
])
def test_what_is_wrong_or_cannot_run_is_left_out_with_its_reason_and_the_others_are_timed(name, noise, told):
    world = World(**{"exact": 0.0, "int8+fp16": 0.01, name: noise})
    rows = world.measure()
    wrong = rows.pop(name.replace("low", "int8+fp8"))
    assert told in wrong["left_out"] and "ms" not in wrong and name not in world.timed
    assert any(told in text for text in world.said)
    assert all(row["runs"] == experiment.ROUNDS for row in rows.values())


def test_a_method_that_fails_while_it_is_timed_has_no_time():
    world = World(exact=0.0, low=0.1)
    once = world.once

    def fails_at_last(call):
        if world.on == "low" and len(world.timed) > 4:
            raise MemoryError("none left")
        return once(call)

    world.once = fails_at_last
    rows = world.measure()
    assert rows["int8+fp8"]["left_out"] == "MemoryError: none left" and "ms" not in rows["int8+fp8"]
    assert rows[REFERENCE]["runs"] == experiment.ROUNDS


def test_without_exact_attention_nothing_is_timed():
    rows = World(untouched=0.0, exact=ValueError("no kernel"), low=0.1).measure()
    assert rows[REFERENCE]["left_out"] == "ValueError: no kernel"
    assert all("no prediction by exact attention" in rows[name]["left_out"] for name in (UNTOUCHED, "int8+fp8"))


def test_turns_end_after_the_budget_but_not_before_the_least():
    world = World(exact=0.0)
    assert world.measure(budget_s=0.0)[REFERENCE]["runs"] == experiment.LEAST_ROUNDS


def test_a_cpu_is_timed_in_milliseconds_by_its_clock(monkeypatch):
    ticks = iter([1.0, 1.25])
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: next(ticks))
    called = []
    assert experiment.clock(paddle.zeros([1]))(lambda: called.append(1)) == 250 and called == [1]


@pytest.mark.parametrize("name, shape, spread", [
    ("transformer_blocks.0.attn1.to_q.weight", [1152, 1152], 1.2 / 1152**0.5),
    ("transformer_blocks.0.attn2.to_k.weight", [1152, 1152], 1.2 / 1152**0.5),
    ("transformer_blocks.0.attn1.to_v.weight", [1152, 1152], 1152**-0.5),
    ("transformer_blocks.0.ff.net.2.weight", [4608, 1152], 4608**-0.5),
    ("pos_embed.proj.weight", [1152, 4, 2, 2], 0.25),
    ("adaln_single.linear.bias", [6912], 0.5),
    ("transformer_blocks.0.attn1.to_q.bias", [1152], 0),
])
def test_weights_are_as_large_as_their_inputs_are_few(name, shape, spread):
    assert experiment._spread(name, shape) == pytest.approx(spread)


def test_the_table_says_times_shares_and_what_was_left_out():
    row = dict(low_ms=1.0, high_ms=1.0, runs=3)
    rows = [dict(method=UNTOUCHED, left_out="MemoryError: a | b"),
            row | dict(method=REFERENCE, ms=200.0, over_exact=1.0, attention_share=0.75, sqnr_db=math.inf, summary="0 of 2"),
            row | dict(method="int8+fp8", ms=100.0, over_exact=2.0, attention_share=0.5, sqnr_db=31.46, summary="2 of 2 ran"),
            row | dict(method=NONE, ms=50.0, over_exact=4.0, attention_share=0.0, sqnr_db=1.0)]
    about = dict(gpu="A card", versions={"paddle": "3"}, commit="abc", command="python -m this")
    model = dict(model="m", tokens=64, batch=2, dtype="float16", own_processor="AttnProcessor", rows=rows)
    page = experiment.markdown(dict(about=about, models=[model]))
    for line in ("# One step of ppdiffusers' models on A card", "paddle 3; commit abc.", "`python -m this`",
                 "## m: 64 tokens, batch 2, float16",
                 "| ppdiffusers' own | left out: MemoryError: a / b | | | |",
                 "| exact, this project's kernel | 200.0 | 1.00x | 75% | itself |",
                 "| int8+fp8, text as `fallback` has it | 100.0 | 2.00x | 50% | 31.5 |",
                 "| no attention | 50.0 |  |  | 1.0 |", "int8+fp8: 2 of 2 ran."):
        assert line in page.splitlines(), line
    assert "ppdiffusers' own: AttnProcessor" in page
    model["own_processor"] = "AttnProcessor2_5"
    assert "AttnProcessor" not in experiment.markdown(dict(about=about, models=[model]))


def test_full_size_needs_a_gpu(tmp_path, capsys):
    from lowbit_video.runtime import paddle_runtime

    if paddle_runtime.default_device() != "cpu":
        pytest.skip("Paddle has a GPU here")
    with pytest.raises(SystemExit):
        experiment.main(["--out", str(tmp_path / "step.json")])
    assert "--tiny is a dry run without one" in capsys.readouterr().err and not list(tmp_path.iterdir())
