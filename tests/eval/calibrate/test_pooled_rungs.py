"""Pooled rungs in a calibration: which there are, what they cost, that a sample errs as the whole call, what they bring."""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))

from toy_pipeline import TEXT_TOKENS, ToyPipeline  # noqa: E402

from lowbit_video import LowBitAttnProcessor, Pooled, Recipe  # noqa: E402
from lowbit_video.app.cli import build_parser, main  # noqa: E402
from lowbit_video.eval.calibrate import run as running  # noqa: E402
from lowbit_video.eval.calibrate.costs import POOLING, TABLE, costs_of  # noqa: E402
from lowbit_video.eval.calibrate.measure import Probe, latents_of, look, measure, relative_error  # noqa: E402
from lowbit_video.eval.calibrate.pooled import SHARES, PooledPlan, rows_of_tiles  # noqa: E402
from lowbit_video.eval.calibrate.run import Plan, calibrate  # noqa: E402
from lowbit_video.eval.calibrate.solve import Budget  # noqa: E402
from lowbit_video.eval.compare.layers import StepClock  # noqa: E402
from lowbit_video.eval.compare.progress import Progress  # noqa: E402
from lowbit_video.eval.compare.settings import Settings  # noqa: E402
from lowbit_video.kernels.pooled.tiles import POOLED_FROM  # noqa: E402
from pooled_inputs import smooth_qkv  # noqa: E402

SETTINGS = Settings("models/toy", steps=2)


def silent(*labels):
    return Progress(labels, lambda line: None)


def test_rungs_keep_the_models_text_and_short_sequences_have_none():
    plan = PooledPlan()
    assert plan.rungs(17776, 226) == tuple(f"int8+fp8 pooled {share:g} always 226" for share in SHARES)
    assert PooledPlan((0.25,), 10).rungs(10, 0) == ("int8+fp8 pooled 0.25",) and not plan.why_not(POOLED_FROM)
    assert plan.rungs(POOLED_FROM - 1, 226) == () and "below 4096 tokens (4095 here)" in plan.why_not(POOLED_FROM - 1)
    assert PooledPlan(()).rungs(17776, 0) == () and "not asked for" in PooledPlan(()).why_not(17776)
    assert "bits are counted" in plan.why_not(17776, True) and "not asked for" in PooledPlan(()).why_not(17776, True)


def test_a_models_text_is_seen():
    settings = Settings("models/toy", steps=4)
    assert look(ToyPipeline(), "a", settings, 0, silent("look")) == (240 + TEXT_TOKENS, TEXT_TOKENS, 32)


def test_a_pooled_rung_costs_what_it_keeps_and_its_choice():
    rungs = ("int8+fp8", "int8+fp16", "int8+fp8 pooled 0.5", "int8+fp8 pooled 1", "int8+fp16 pooled 0.25 always 200",
             "fp8+fp16 pooled 0.5")
    costs = costs_of(rungs, 1920, 64, TABLE)  # 15 key tiles, 10 query tiles, of which two hold text
    assert costs.of["int8+fp8 pooled 0.5"] == pytest.approx(8 / 15 + POOLING) and costs.of["int8+fp8 pooled 1"] == 1
    kept = (2 * 15 + 8 * 4) / 150
    assert costs.of["int8+fp16 pooled 0.25 always 200"] == pytest.approx(costs.of["int8+fp16"] * kept + POOLING)
    assert costs.lacking == ("fp8+fp16 pooled 0.5",) and 0.05 < POOLING < 0.2


def test_rows_are_whole_tiles_after_those_with_text():
    assert rows_of_tiles(1000, 200, 192, 1) == ([slice(0, 192), slice(192, 384), slice(384, 576), slice(576, 768),
                                                 slice(768, 960), slice(960, 1000)], 384)
    rows, placed = rows_of_tiles(192 * 40, 6, 192, 400)
    assert placed == 192 and len(rows) == 9 and len(set(map(str, rows))) == 9
    assert rows[0] == slice(0, 192) and all(row.start % 192 == 0 and row.stop - row.start == 192 for row in rows)
    assert len(rows_of_tiles(192 * 40, 0, 192, 192 * 10)[0]) == 10 and rows_of_tiles(100, 90, 192, 9) == ([slice(0, 100)], 0)


@pytest.mark.parametrize("always", [0, 200])
def test_a_sample_of_rows_errs_as_these_rows_of_the_whole_call(always):
    q, k, v = (paddle.to_tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in smooth_qkv((1, 2, 192 * 11 + 30, 64)))
    pooled = LowBitAttnProcessor("int8+fp8", pooled=Pooled(0.3, always))
    clock = StepClock(silent("one"))
    probe = Probe([pooled, LowBitAttnProcessor("int8+fp8")], 3, clock, {0})
    probe.attend(q, k, v)
    rows, placed = rows_of_tiles(192 * 11 + 30, always, 192, 3)
    compared = [at for row in rows for at in range(row.start, row.stop)][placed:]
    exact = LowBitAttnProcessor("exact").attend(q, k, v).numpy()[:, compared]
    assert 0 < len(compared) < q.shape[1] - always
    for number, processor in enumerate((pooled, LowBitAttnProcessor("int8+fp8"))):
        low = processor.attend(q, k, v).numpy()[:, compared]
        wanted = np.square(low - exact).sum((0, 1, 3)) / np.square(exact).sum()
        np.testing.assert_allclose(probe.error({0})[number], wanted, rtol=2e-3)


@pytest.fixture(scope="module")
def uneven():
    """A toy model whose second layer looks sharply."""
    made = ToyPipeline(grid=(5, 16, 12), layers=2)
    attention = made.transformer.transformer_blocks[1].attn1
    for name in ("to_q", "to_k"):
        weight = getattr(attention, name).weight
        weight.set_value(weight * 3)
    attention.norm_q = attention.norm_k = None
    return made


def test_a_calibrated_recipe_errs_less_than_one_share_everywhere_at_the_same_cost(uneven, tmp_path):
    uniform = "int8+fp8 pooled 0.5 always 6"
    cost = costs_of([uniform], 966, 32).of[uniform]
    lines = []
    plan = Plan(rungs=("int8+fp8",), ranges=2, by_head=True, pooled=PooledPlan((0.2, 0.5, 0.8), least=966))
    recipe = calibrate(uneven, ["a red ball"], Budget(cost=cost), tmp_path / "r.toml", settings=SETTINGS, plan=plan,
                       say=lines.append)
    table = recipe.resolve(uneven)
    assert sum(share * costs_of([rung], 966, 32).of[rung] for rung, share in table.shares().items()) <= cost + 1e-6
    latents = {name: latents_of(uneven, "another prompt", SETTINGS, 0, StepClock(silent("one")), attention, "one", "")
               for name, attention in (("exact", None), ("recipe", recipe), ("uniform", Recipe([{"rung": uniform}])))}
    errors = {name: relative_error(latents[name], latents["exact"]) for name in ("recipe", "uniform")}
    assert errors["recipe"] < 0.8 * errors["uniform"], (errors, str(table))
    about = Recipe.load(tmp_path / "r.toml").about
    assert [text.partition(":")[0] for text in about["rungs"]] == [
        "int8+fp8", *(f"int8+fp8 pooled {share} always 6" for share in (0.2, 0.5, 0.8))]
    assert "left_out" not in about and about["order"] == "raster"


def test_a_short_model_has_no_pooled_rungs_and_the_recipe_says_so(tmp_path):
    lines = []
    recipe = calibrate(ToyPipeline(layers=1), ["a"], Budget(cost=1.03), tmp_path / "r.toml", settings=SETTINGS,
                       plan=Plan(rungs=("int8+fp16", "int8+fp8"), ranges=1), kept=tmp_path / "there", say=lines.append)
    assert len(list((tmp_path / "there").iterdir())) == 1 and not (tmp_path / "r_measured").exists()
    why = "no pooled rungs: choosing what to pool costs more than it saves below 4096 tokens (246 here)"
    assert why in lines and recipe.about["left_out"] == [why] and not any("pooled" in rung for rung in recipe.about["rungs"])


@pytest.mark.parametrize("scheme, budget, rungs", [
    ("measured", Budget(bits=6), ("int8+fp8 pooled 0.4 always 6", "int8+fp8", "int4+fp8")),
    ("seed", None, ("exact", "int8+fp16", "int4+fp16"))])
def test_where_bits_are_counted_pooled_rungs_are_left_out_unmeasured(scheme, budget, rungs, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "look", lambda *given: pytest.fail("a run to name rungs that are left out"))
    monkeypatch.setattr(running, "measure", lambda pipe, prompt, given, *rest, **named: (
        measured.append(given), measure(pipe, prompt, given, *rest, **named))[1])
    measured, lines, pipe = [], [], ToyPipeline(layers=1)
    plan = Plan(rungs, ranges=1, pooled=PooledPlan((0.5,), least=10), scheme=scheme)  # long enough
    recipe = calibrate(pipe, ["a"], budget, tmp_path / "r.toml", settings=SETTINGS, plan=plan, say=lines.append)
    plain = [rung for rung in rungs if "pooled" not in rung]
    why = ["no pooled rungs: bits are counted, and keys that are pooled have none",
           *(f"without bits, so not chosen: {rung}" for rung in rungs if "pooled" in rung)]
    about = Recipe.load(tmp_path / "r.toml").about
    assert [line for line in lines if line in why] == about["left_out"] == why
    assert [text.partition(":")[0] for text in about["rungs"]] == plain and set(recipe.resolve(pipe).shares()) <= set(plain)
    assert measured == [[*(rung for rung in plain if rung != "exact"), *["int4+fp16"] * ("int4+fp16" not in plain)]]


def test_the_command_line_reaches_the_plan(monkeypatch, tmp_path, capsys):
    from lowbit_video.eval.calibrate import cli
    from lowbit_video.hook import order

    (tmp_path / "p.txt").write_text("a\nb\n")
    words = ["calibrate", "--model", str(tmp_path), "--prompts", str(tmp_path / "p.txt"), "--budget", "40dB", "--out",
             str(tmp_path / "r.toml"), "--limit", "1"]
    called, orders = [], []
    monkeypatch.setattr(cli, "load", lambda args: (SimpleNamespace(), "settings"))
    monkeypatch.setattr(order, "order_tokens", lambda pipe, named: orders.append(named))
    monkeypatch.setattr(running, "calibrate", lambda *given, **named: called.append((named["plan"], named["kept"])))
    for more in ([], ["--pooled", "0.25,0.4", "--pooled-from", "900", "--order", "hilbert"],
                 ["--pooled", "none", "--measured", "m"], ["--rungs", "int8+fp8,int8+fp8 pooled 0.4 always 6"]):
        args = build_parser("calibrate").parse_args([*words, *more])
        assert args.run(args) == 0
    plans, folders = zip(*called)
    assert [plan.pooled for plan in plans] == [PooledPlan(), PooledPlan((0.25, 0.4), 900), PooledPlan(()), PooledPlan()]
    assert orders == ["hilbert"] and folders == (None, None, Path("m"), None)
    assert plans[3].rungs == ("int8+fp8", "int8+fp8 pooled 0.4 always 6")
    for bad in ("0.3,1.2", "all", "0"):
        with pytest.raises(SystemExit):
            main([*words, "--pooled", bad])
        assert "no list of shares between 0 and 1" in capsys.readouterr().err
