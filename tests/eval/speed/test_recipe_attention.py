"""The experiment that times a recipe's attention: what it counts, and how it sums."""
import json
import sys

import numpy as np
import pytest

from lowbit_video.eval.speed import bench, timing
from lowbit_video.eval.speed.experiments import recipe_attention
from lowbit_video.hook.recipe.recipe import Recipe

RULES = [{"rung": "int8+fp8"}, {"layers": "transformer_blocks.1.*", "heads": "1", "steps": "0.25-1", "rung": "exact"}]


def test_choices_are_counted_by_layers_and_steps():
    found = recipe_attention.choices_of(Recipe(RULES), layers=4, heads=2)
    assert found == {("int8+fp8", "int8+fp8"): pytest.approx(3.25 / 4), ("int8+fp8", "exact"): pytest.approx(0.75 / 4)}


def test_a_recipes_time_is_the_sum_of_what_it_chooses(monkeypatch, tmp_path, capsys):
    model = tmp_path / "model" / "transformer"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 64}))
    Recipe(RULES).save(tmp_path / "mine.toml")
    seen = {}

    def timed(timer, calls, **more):
        seen.update({name: call() for name, call in calls.items()})
        ms = {"int8+fp8": 1.0, "exact": 2.0, "framework's exact": 3.0, ("int8+fp8", "exact"): 8.0, ("exact", "exact"): 2.5}
        return {name: timing.Timing(ms.get(name, 4.0), 0, 0, 1, 0) for name in calls}

    def inputs(runtime, shape, dtype, like):
        assert shape == (1, 128, 2, 64) and dtype == "bfloat16"
        drawn = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
        return [runtime.from_numpy(one, like, "float32") for one in drawn]

    monkeypatch.setattr(recipe_attention, "make_inputs", inputs)
    monkeypatch.setattr(recipe_attention.detect, "anchor", lambda framework, device, anchor=recipe_attention.detect.anchor:
                        anchor(framework, "cpu"))
    monkeypatch.setattr(timing, "Timer", lambda *given: None)
    monkeypatch.setattr(timing, "time_together", timed)
    monkeypatch.setattr(bench, "environment", lambda framework: {"framework": framework})
    mine, out = str(tmp_path / "mine.toml"), tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["recipe_attention", mine, "exact", "--model", str(tmp_path / "model"), "--tokens", "128",
                                      "--batch", "1", "--framework", "paddle", "--out", str(out)])
    assert recipe_attention.main() == 0
    report = json.loads(out.read_text())
    ms = 4.0 * 3.25 / 4 + 8.0 * 0.75 / 4
    assert report["recipes"] == {mine: {"ms": ms, "faster": round(1 / ms, 3), "choices": 2},
                                 "exact": {"ms": 2.5, "faster": 0.4, "choices": 1}}
    assert report["ms"] == {"int8+fp8": 1.0, "exact": 2.0, "framework's exact": 3.0}
    low, both, exact = (seen[name].astype("float32").numpy()
                        for name in ("int8+fp8", ("int8+fp8", "exact"), "exact"))
    np.testing.assert_array_equal(both[:, :, 0], low[:, :, 0])
    assert np.abs(both[:, :, 1] - exact[:, :, 1]).max() < 0.01 < np.abs(low - exact).max()
