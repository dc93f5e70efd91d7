"""`calibrate`: what errs most gets the better rung, the same prompts give the same recipe, a second start goes on."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))

from toy_pipeline import ToyPipeline  # noqa: E402

import lowbit_video  # noqa: E402
from lowbit_video import Recipe, apply  # noqa: E402
from lowbit_video.app.cli import build_parser, main  # noqa: E402
from lowbit_video.eval.calibrate import measure as measuring  # noqa: E402
from lowbit_video.eval.calibrate import run as running  # noqa: E402
from lowbit_video.eval.calibrate.measure import Probe, latents_of, measure, relative_error  # noqa: E402
from lowbit_video.eval.calibrate.pooled import PooledPlan  # noqa: E402
from lowbit_video.eval.calibrate.run import Plan, calibrate  # noqa: E402
from lowbit_video.eval.calibrate.solve import Budget, db  # noqa: E402
from lowbit_video.eval.compare.layers import StepClock  # noqa: E402
from lowbit_video.eval.compare.progress import Progress  # noqa: E402
from lowbit_video.eval.compare.settings import Settings  # noqa: E402
from lowbit_video.hook.processors import LowBitAttnProcessor  # noqa: E402
from lowbit_video.runtime import paddle_runtime  # noqa: E402

SETTINGS = Settings("models/toy", steps=4)
PLAN = Plan(rungs=("exact", "int8+fp16", "int8+fp8"), ranges=2)
RANGES = [range(0, 2), range(2, 4)]


def silent(labels):
    return Progress(labels, lambda line: None)


@pytest.fixture(scope="module")
def pipe():
    return ToyPipeline()


@pytest.fixture(scope="module")
def measured(pipe):
    return measure(pipe, "a red ball", ["int8+fp16", "int8+fp8", "int4+fp16"], "int4+fp16", RANGES, SETTINGS, seed=0, samples=2,
                   rows=1000, backend="auto", progress=silent(["record", "probe", "probe"]))


def test_local_errors_are_those_of_the_attention(pipe, measured):
    assert measured.errors.shape == (3, 3, 2, 2) and (measured.tokens, measured.head_dim) == (246, 32)
    worse = measured.errors.sum((1, 2, 3))
    assert worse[0] < worse[1] < worse[2]
    seen = {}

    class Twice(LowBitAttnProcessor):
        def attend(self, q, k, v, *rest):
            exact, low = LowBitAttnProcessor("exact").attend(q, k, v).numpy(), super().attend(q, k, v, *rest).numpy()
            seen.setdefault(id(self), []).append(np.square(low - exact).sum((0, 1, 3)) / np.square(exact).sum())
            return LowBitAttnProcessor("exact").attend(q, k, v)

    clock = StepClock(silent(["one"]))
    latents_of(pipe, "a red ball", SETTINGS, 0, clock, {f"transformer_blocks.{i}.attn1": Twice("int8+fp8") for i in range(3)},
               "one", "")
    for layer, calls in enumerate(seen.values()):
        wanted = np.stack([np.mean(calls[:2], 0), np.mean(calls[2:], 0)])  # [G, H]
        np.testing.assert_allclose(measured.errors[1, layer], wanted, rtol=0.05)


def test_gains_carry_the_probe_to_the_final_latent(pipe, measured):
    latents = {}
    for name, attention in (("exact", None), ("all", "int4+fp16")):
        latents[name] = latents_of(pipe, "a red ball", SETTINGS, 0, StepClock(silent(["one"])), attention, "one", "")
    whole = relative_error(latents["all"], latents["exact"])
    assert measured.gains.shape == (2,) and (measured.gains > 0).all()
    assert abs(db(measured.weighed()[2].sum()) - db(whole)) < 3


def test_rows_are_a_sample_and_steps_not_sampled_are_not_measured():
    import paddle

    clock = StepClock(silent(["one"]))
    probe = Probe([LowBitAttnProcessor("int8+fp16")], 10, clock, {1}, peaked=True)
    q = paddle.randn([1, 95, 2, 32])
    probe.attend(q, q, q)
    assert not probe.squared
    clock.step = 1
    k = q * paddle.to_tensor([-2.0, 1.0]).reshape([1, 1, 2, 1])
    probe.attend(q * 0.5, k, q * 3)
    tops = q.abs().max([0, 1, 3]).numpy()
    np.testing.assert_allclose(probe.peak({1}), tops[:, None] * [[0.5, 2, 3], [0.5, 1, 3]], rtol=1e-6)
    probe.attend(q * 0.1, q * 4, q * 0.1)
    np.testing.assert_allclose(probe.peak({1}), tops[:, None] * [[0.5, 4, 3]], rtol=1e-6)
    probe.squared.clear()
    probe.whole.clear()
    out = probe.attend(q, q, q)
    assert list(probe.squared) == [1] and probe.whole[1][0] == pytest.approx(float((out[:, 4::9] ** 2).sum()), rel=1e-5)
    with pytest.raises(ValueError, match="not causal"):
        probe.attend(q, q, q, is_causal=True)


def test_a_recipe_is_written_checked_and_made_again_alike(pipe, tmp_path, monkeypatch):
    lines = []
    out = tmp_path / "new" / "r.toml"
    again = dict(settings=SETTINGS, plan=PLAN, say=lines.append)
    recipe = calibrate(pipe, ["a red ball", "b"], Budget(cost=1.03), out, held_out=["c"], **again)
    assert Recipe.load(out) == recipe and out.with_suffix(".png").stat().st_size > 10_000
    about = recipe.about
    assert about["predicted_cost"] <= 1.03 and about["prompts"] == ["a red ball", "b"] and about["steps"] == 4
    assert abs(about["found_error_db"][0] - about["predicted_error_db"]) < 12 and "kernels.json" in about["cost_table"]
    least, most = about["predicted_spread_db"]
    assert least < about["predicted_error_db"] < most  # of two prompts' errors the mean
    assert db((10 ** (-least / 10) + 10 ** (-most / 10)) / 2) == pytest.approx(about["predicted_error_db"], abs=0.01)
    assert any(f"each by itself: {least:.1f} to {most:.1f} dB predicted" in line for line in lines)
    within = int(about["found_error_db"][0] >= least)
    assert f"{within} of 1 held-out prompts err no more than the worst of these" in lines
    assert len(set(recipe.resolve(pipe).shares())) > 1
    assert f"lowbit-video {lowbit_video.__version__}" in about["versions"]
    first = out.read_text()
    assert len(list((tmp_path / "new" / "r_measured").iterdir())) == 2

    def no_more(*given, **named):
        raise AssertionError("what was measured is measured again")

    monkeypatch.setattr(running, "measure", no_more)
    calibrate(pipe, ["a red ball", "b"], Budget(cost=1.03), out, held_out=["c"], **again)
    assert out.read_text() == first and any("2 of 2 prompts are measured already" in line for line in lines)
    with pytest.raises(AssertionError, match="measured again"):
        calibrate(pipe, ["a red ball"], Budget(cost=1.03), out, **{**again, "settings": Settings("models/toy", steps=2)})


def test_rungs_without_a_price_are_told_before_any_is_measured(pipe, tmp_path, monkeypatch):
    row = {"causal": False, "batch": 1, "heads": 2}
    rows = [{**row, "head_dim": dim, "tokens": 512, "precision": precision, "total_ms": ms} for dim, precision, ms in (
        (32, "int8+fp8", 1.0), (32, "int8+fp16", 1.5), (64, "int8+fp8", 1.0), (64, "int4+fp8", 2.0))]
    (tmp_path / "speed.json").write_text(json.dumps({"rows": rows}))
    asked = dict(settings=SETTINGS, speed=tmp_path / "speed.json")
    seen, lines = [], []

    def noted(pipe, prompt, rungs, *rest, **named):
        seen.append(rungs)
        return measure(pipe, prompt, rungs, *rest, **named)

    monkeypatch.setattr(running, "measure", noted)
    recipe = calibrate(pipe, ["a"], Budget(cost=1.2), tmp_path / "r.toml", plan=Plan(("int8+fp16", "int4+fp8", "int8+fp8"),
                       ranges=1, pooled=PooledPlan(())), say=lines.append, **asked)
    why = ["no pooled rungs: not asked for", "not priced, so not chosen: int4+fp8"]
    assert seen == [["int8+fp16", "int8+fp8", "int4+fp16"]] and recipe.about["left_out"] == why
    assert [line for line in lines if line in why] == why and recipe.about["rungs"] == ["int8+fp16: 1.5", "int8+fp8: 1"]
    with pytest.raises(ValueError, match=r"rungs are exact, int4\+fp8, and none of them has a time in .*speed.json at 512 "
                       r"tokens, head dim 32; name some of int8\+fp8, int8\+fp16, or give another table: --speed"):
        calibrate(pipe, ["a"], Budget(cost=1.2), tmp_path / "r.toml", plan=Plan(("exact", "int4+fp8"), ranges=1), **asked)
    assert len(seen) == 1


@pytest.mark.parametrize("scheme, budget, least", [("measured", Budget(cost=0.1), "0.1x cannot be met: .* at least 1x"),
                                                   ("measured", Budget(bits=3), "3bit cannot be met: .* at least 8bit"),
                                                   ("seed", Budget(bits=3), "3bit cannot be met: .* at least 4bit")])
def test_a_budget_below_the_cheapest_rung_is_refused_before_any_is_measured(pipe, tmp_path, monkeypatch, scheme, budget, least):
    def never(*given, **named):
        raise AssertionError("measured")

    monkeypatch.setattr(running, "measure", never)
    plan = PLAN if scheme == "measured" else Plan(("exact", "int8+fp16", "int4+fp16"), scheme=scheme, ranges=2)
    with pytest.raises(ValueError, match=f"a budget of {least}, the cheapest of them everywhere; name cheaper ones, or raise"):
        calibrate(pipe, ["a"], budget, tmp_path / "r.toml", settings=SETTINGS, plan=plan)


def test_a_layer_that_errs_more_is_given_more(pipe, tmp_path):
    planted = ToyPipeline()
    for name in ("to_q", "to_k"):
        weight = getattr(planted.transformer.transformer_blocks[1].attn1, name).weight
        weight.set_value(weight * 8)
    planted.transformer.transformer_blocks[1].attn1.norm_q = planted.transformer.transformer_blocks[1].attn1.norm_k = None
    recipe = calibrate(planted, ["a red ball"], Budget(cost=1.05), tmp_path / "r.toml", settings=SETTINGS,
                       plan=Plan(rungs=("exact", "int8+fp8"), ranges=2), say=lambda line: None)
    exact = {name: sum(span.end - span.start for span in plan.spans if span.rungs[0] == "exact")
             for name, plan in recipe.resolve(planted).layers.items()}
    assert exact["transformer_blocks.1.attn1"] == sum(exact.values()) > 0


def test_the_seeds_scheme_gives_larger_values_more_bits(tmp_path):
    planted = ToyPipeline()
    attention = planted.transformer.transformer_blocks[1].attn1
    for name in ("to_q", "to_k", "to_v"):
        weight = getattr(attention, name).weight
        weight.set_value(weight * 10)
    attention.norm_q = attention.norm_k = None
    lines, out = [], tmp_path / "r.toml"
    asked = dict(settings=SETTINGS, say=lines.append)
    seed = Plan(("exact", "int8+fp16", "int4+fp16"), ranges=2, scheme="seed")
    recipe = calibrate(planted, ["a red ball"], None, out, plan=seed, held_out=["c"], **asked)
    bits = {name: [span.rungs[0] for span in plan.spans] for name, plan in recipe.resolve(planted).layers.items()}
    assert all(rung == "exact" for rung in bits["transformer_blocks.1.attn1"])
    assert all(rung != "exact" for name in ("transformer_blocks.0.attn1", "transformer_blocks.2.attn1") for rung in bits[name])
    about = recipe.about
    assert about["cost_table"] == "bits of Q and K" and 4 <= about["predicted_cost"] < 16 and "sizes of Q" in about["title"]
    assert abs(about["found_error_db"][0] - about["predicted_error_db"]) < 15
    assert out.with_suffix(".png").stat().st_size > 10_000
    ours = calibrate(planted, ["a red ball"], Budget(bits=about["predicted_cost"] + 1e-3), out, **asked,
                     plan=Plan(seed.rungs, ranges=2))
    assert any("1 of 1 prompts are measured already" in line for line in lines)  # which has more than errors need
    assert ours.about["predicted_error_db"] >= about["predicted_error_db"] and ours.about["budget"].endswith("bit")
    assert ours.about["predicted_cost"] <= about["predicted_cost"] + 1e-3


def test_q_k_and_v_are_copied_to_the_host_for_the_seeds_scheme_alone(tmp_path, monkeypatch):
    copied = []

    class Runtime:
        def __getattr__(self, name):
            return getattr(paddle_runtime, name)

        def to_numpy(self, tensor):
            copied.append(tuple(tensor.shape))
            return paddle_runtime.to_numpy(tensor)

    monkeypatch.setattr(measuring, "runtime_of", lambda tensor: Runtime())
    whole = [(2, 246, 2, 32)] * 3
    again = lambda scheme, budget: calibrate(
        ToyPipeline(layers=1), ["a"], budget, tmp_path / "r.toml", settings=SETTINGS, say=lambda line: None,
        plan=Plan(("exact", "int8+fp16", "int4+fp16"), ranges=1, rows=9, scheme=scheme, pooled=PooledPlan(())))
    again("measured", Budget(bits=7))
    assert copied and not set(whole) & set(copied)
    copied.clear()
    again("seed", None)  # what was measured lacks the magnitudes
    assert [shape for shape in copied if shape in whole] == whole
    copied.clear()
    again("seed", None)
    again("measured", Budget(bits=7))
    assert not copied and len(list((tmp_path / "r_measured").iterdir())) == 1


def test_bad_requests_are_named_before_any_work(pipe, tmp_path, capsys):
    for given, says in (((["a"], Budget(cost=2)), "steps is not known"), (([], Budget(cost=2)), "at least one prompt")):
        with pytest.raises(ValueError, match=says):
            calibrate(pipe, *given, tmp_path / "r.toml", settings=Settings("toy"))
    with pytest.raises(ValueError, match="others to check on"):
        calibrate(pipe, ["a"], Budget(cost=2), tmp_path / "r.toml", held_out=["a"], settings=SETTINGS)
    (tmp_path / "p.txt").write_text("a\nb\n")
    command = ["calibrate", "--prompts", str(tmp_path / "p.txt"), "--model", str(tmp_path)]
    right = ["--budget", "1x", "--out", "r.toml", "--limit", "1"]
    for more, says in ((["--budget", "9", "--out", "r.toml"], "budget is '9'"),
                       (["--out", "r.toml"], "no budget"), (["--scheme", "seed", "--budget", "45dB"], "give bits"),
                       (["--scheme", "seed", "--rungs", "exact", "--out", "r.toml", "--limit", "1"], "chooses among exact"),
                       (["--budget", "1x", "--out", "r"], "ends in .toml"),
                       (right[:-2], "p.txt has 2 prompts; 2 are to be measured and 1 held out"),
                       ([*right, "--rungs", "pooled"], "there is no rung 'pooled'"),
                       (["--budget", "6bit", *right[2:], "--rungs", "int8+fp8 pooled 0.3"], "pooled keys have no bits"),
                       (["--budget", "3bit", *right[2:]], "3bit cannot be met: these rungs give at least 4bit"),
                       ([*right, "--speed", "none.json"], "no such file: none.json")):
        assert main([*command, *more]) == 2 and says in capsys.readouterr().err
    assert not apply(pipe, None).remove()


def test_the_command_line_reaches_the_plan(monkeypatch, tmp_path):
    from lowbit_video.eval.calibrate import cli

    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    words = ["calibrate", "--model", str(tmp_path), "--prompts", str(tmp_path / "p.txt"), "--budget", "40dB", "--out",
             str(tmp_path / "r.toml"), "--limit", "1", "--held-out", "2", "--rungs", "exact,int8+fp8", "--by-head", "--ranges",
             "3", "--samples", "2", "--rows", "7", "--seed", "5", "--backend", "reference"]
    called = []
    monkeypatch.setattr(cli, "load", lambda args: ("pipe", "settings"))
    monkeypatch.setattr(running, "calibrate", lambda *given, **named: called.append((given, named)))
    args = build_parser("calibrate").parse_args(words)
    assert args.run(args) == 0
    (given, named), = called
    assert given == ("pipe", ["a"], Budget(error_db=40.0), tmp_path / "r.toml")
    assert named["plan"] == Plan(("exact", "int8+fp8"), ranges=3, samples=2, rows=7, by_head=True)
    assert (named["held_out"], named["settings"], named["seed"], named["backend"]) == (["b", "c"], "settings", 5, "reference")
    for more, budget, scheme in ((["--scheme", "seed"], None, "seed"), (["--budget", "6.5bit"], Budget(bits=6.5), "measured")):
        called.clear()
        args = build_parser("calibrate").parse_args([*words[:5], *more, *words[7:11], "--held-out", "2"])
        assert args.run(args) == 0
        assert called[0][0][2] == budget and called[0][1]["plan"] == Plan(("exact", "int8+fp16", "int4+fp16"), scheme=scheme)
