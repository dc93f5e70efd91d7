"""Hooks with pooled keys: asked for by a text, counted tile by tile in the report, refused as recipes refuse."""
import sys
from pathlib import Path

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
sys.path.insert(0, str(Path(__file__).parents[2]))

from lowbit_video import LowBitAttnProcessor, Pooled, Precision, Recipe, apply, coverage, remove  # noqa: E402
from lowbit_video.app.job import Job  # noqa: E402
from lowbit_video.eval.compare.candidates import as_candidate  # noqa: E402
from lowbit_video.kernels.pooled import reference  # noqa: E402
from lowbit_video.rung import as_rung  # noqa: E402

import toy_model  # noqa: E402

RUNG = "int8+fp8 pooled 0.3 always 7"
INPUTS = dict(video_tokens=1100, text_tokens=7)
APART = "; prologue apart: pooling needs the means of tiles of normed keys first"


@pytest.fixture
def model():
    return toy_model.model()


def video_of(model):
    with paddle.no_grad():
        return model(**toy_model.inputs(**INPUTS))[0].numpy()


def test_a_text_is_the_same_as_a_processor_and_patterns_may_have_their_own(model):
    exact = video_of(model)
    apply(model, "int8+fp8 pooled 0.5", modules={"blocks.0": RUNG})
    assert model.blocks[0].processor.pooled == Pooled(0.3, 7) and model.blocks[1].processor.pooled == Pooled(0.5)
    ours = video_of(model)
    remove(model)
    given = {"blocks.0": LowBitAttnProcessor("int8+fp8", pooled=Pooled(0.3, 7)),
             "blocks.1": LowBitAttnProcessor("int8+fp8 pooled 0.5")}
    apply(model, None, given)
    np.testing.assert_array_equal(video_of(model), ours)
    assert 0 < np.abs(ours - exact).max() < 0.5


def test_the_report_counts_what_is_kept_and_what_is_pooled(model, monkeypatch):
    seen = []

    def choose(*given):
        seen.append(real(*given))
        return seen[-1]

    real = reference.choose
    monkeypatch.setattr(reference, "choose", choose)
    apply(model, RUNG, modules={"blocks.1": "int8+fp8"})
    video_of(model), video_of(model)
    kept, pooled = (sum(int(chosen.sum()) for chosen in seen), sum(int((~chosen).sum()) for chosen in seen))
    report = coverage(model)
    variant = f"int8+fp8 pooled 0.3 (reference-lowbit{APART})"
    assert len(seen) == 2 and report.tiles() == {variant: (kept, pooled)}
    values = report.as_dict()
    assert values["tiles"] == {variant: {"kept": kept, "pooled": pooled}}
    run, = values["modules"][0]["runs"]
    assert (run["kept_tiles"], run["pooled_tiles"]) == (kept, pooled) and "kept_tiles" not in values["modules"][1]["runs"][0]
    share = f"{kept / (kept + pooled):.1%}"
    assert f"{variant}, {share} kept" in str(report)
    assert f"{kept} of {kept + pooled} pairs of a query tile and a key tile were kept ({share}) and {pooled} pooled." in (
        str(report).splitlines()[-1])
    model.blocks[0].processor.records.clear()
    assert coverage(model).tiles() == {} and "pooled." not in str(coverage(model))


def test_each_rung_of_a_recipe_is_counted(model):
    other = {"rung": "int8+fp8 pooled 0.5", "heads": [1]}
    apply(model, Recipe([{"rung": RUNG}, other, {"rung": "exact", "layers": "blocks.1"}]))
    video_of(model)
    tiles = coverage(model).tiles()
    assert tiles == {f"heads 0: int8+fp8 pooled 0.3 (reference-lowbit{APART})": Pooled(0.3, 7).tiles(2, 1, 1107, 1107, 32),
                     f"heads 1: int8+fp8 pooled 0.5 (reference-lowbit{APART})": Pooled(0.5).tiles(2, 1, 1107, 1107, 32)}


def test_counts_of_several_shares():
    assert Pooled((0.5, 1.0)).tiles(2, 2, 192, 1280, 64) == (2 * 15, 2 * 5)
    with pytest.raises(ValueError, match="2 shares, and q has 3 heads"):
        Pooled((0.5, 1.0)).tiles(1, 3, 192, 1280, 64)


@pytest.mark.parametrize("bad, says", [
    ("exact pooled 0.3", "there is no rung 'exact pooled 0.3'"), ("int8+fp8 rotate pooled 0.3", "rotated are not pooled"),
    ("int8+fp8 pooled", "such as 'int8[+]fp8 pooled 0.3'"), ("int8+fp8 pooled 1.5", "keep is 1.5"),
    ("int8+fp9", "unknown precision 'int8[+]fp9'")])
def test_what_cannot_be_meant_is_refused_wherever_a_precision_is_taken(model, bad, says):
    for take in (lambda: apply(model, bad), lambda: apply(model, None, {"blocks.0": bad}), lambda: Job(precision=bad),
                 lambda: Job(modules={"*": bad}), lambda: as_candidate(bad), lambda: LowBitAttnProcessor(bad)):
        with pytest.raises(ValueError, match=says):
            take()
    assert not remove(model)


def test_pooling_is_said_once():
    assert as_rung(RUNG) == (Precision("int8+fp8"), Pooled(0.3, 7)) and as_rung("int4+fp8 rotate")[1] is None
    with pytest.raises(ValueError, match="pooled=pooled 0.3 does too; give one"):
        LowBitAttnProcessor(RUNG, pooled=Pooled(0.3))
    with pytest.raises(TypeError, match="pooled is 0.3"):
        LowBitAttnProcessor("int8+fp8", pooled=0.3)
    assert Job(precision=RUNG).hooked and as_candidate(RUNG).slug == "int8+fp8-pooled-0.3-always-7"
