"""Precision strings."""
from dataclasses import replace

import numpy as np
import pytest

import lowbit_video
from lowbit_video import LowBitAttnProcessor, Precision, Recipe
from lowbit_video.precision import as_precision, precision_specs
from lowbit_video.rung import as_rung


@pytest.mark.parametrize("spec, q, k, pv, granularity, smooth_q", [
    ("int8+fp16", "int8", "int8", "fp16", "block", False),
    ("int8+fp8", "int8", "int8", "fp8", "block", False),
    ("int8/int4+fp8", "int8", "int4", "fp8", "token", False),
    ("int4+fp16", "int4", "int4", "fp16", "token", True),
    ("int2+fp16", "int2", "int2", "fp16", "token", True),
    ("fp8+fp8", "fp8", "fp8", "fp8", "block", False)])
def test_parts_and_defaults(spec, q, k, pv, granularity, smooth_q):
    p = Precision(spec)
    assert (p.q, p.k, p.pv, p.granularity, p.smooth_k, p.smooth_q, p.exact, str(p)) == \
        (q, k, pv, granularity, True, smooth_q, False, spec)


def test_choices_override_defaults():
    p = Precision("int8+fp16", granularity="token", smooth_k=False, smooth_q=True)
    assert (p.granularity, p.smooth_k, p.smooth_q) == ("token", False, True)
    assert as_precision(p) is p


@pytest.mark.parametrize("spec", ["fp16", "bf16", "fp32", "exact"])
def test_exact(spec):
    p = Precision(spec)
    assert p.exact and not p.smooth_k and not p.smooth_q
    with pytest.raises(ValueError, match="exact"):
        Precision(spec, smooth_k=True)


@pytest.mark.parametrize("spec", ["int3", "int8", "int8+int8", "int4/int8+fp16", "", "INT8+fp16", "int8+fp16+fp8"])
def test_unknown_lists_what_exists(spec):
    with pytest.raises(ValueError, match="there are: .*int8/int4"):
        Precision(spec)


def test_rotation_is_said_by_text_or_by_argument():
    p = Precision("int4+fp8 rotate")
    assert p == Precision("int4+fp8", rotate=True) == as_precision("int4+fp8 rotate") != Precision("int4+fp8")
    assert (p.spec, str(p), p.q, p.pv, p.smooth_q, p.rotate) == ("int4+fp8", "int4+fp8 rotate", "int4", "fp8", True, True)
    assert replace(p, rotate=False) == Precision("int4+fp8") and Precision("int4+fp8").rotate is False
    with pytest.raises(ValueError, match="'exact' is exact: it has no granularity, no smoothing and no rotation"):
        Precision("exact rotate")
    with pytest.raises(ValueError, match="unknown precision 'int3\\+fp8'; .* with ' rotate' behind them"):
        Precision("int3+fp8 rotate")
    with pytest.raises(ValueError, match="'int8\\+fp8 rotate' and rotate=False contradict each other"):
        Precision("int8+fp8 rotate", rotate=False)
    with pytest.raises(TypeError, match="rotate is 'no'; give True or False"):
        Precision("int8+fp8", rotate="no")


@pytest.mark.parametrize("given, error", [("safe", ValueError), ("mine.toml", ValueError), (Recipe.load("fast"), TypeError)])
def test_a_recipe_is_told_where_it_goes(given, error):
    for take in (as_precision, as_rung, LowBitAttnProcessor):
        with pytest.raises(error, match="is a recipe, and one precision is wanted here; .*Recipe.load.* take --recipe FILE"):
            take(given)


@pytest.mark.parametrize("given, says", [
    ("int8+fp8 pooled 0.3 always 64", r"takes the two apart: 'int8\+fp8', pooled=lowbit_video.Pooled\(0.3, 64\) .* warmup"),
    ("int4+fp16 pooled 0.5", r"'int4\+fp16', pooled=lowbit_video.Pooled\(0.5, 0\)"), ("my pooled.toml", "is a recipe"),
    ("int8+fp8 pooled 0.3 rotate", "no rung 'int8.fp8 pooled 0.3 rotate': keys that are rotated are not pooled; leave out one"),
    ("int8+fp8 rotate pooled 0.3", "rotated are not pooled"), ("int8+fp9 pooled 0.3", "there is no rung 'int8.fp9 pooled 0.3'"),
    ("int8+fp8 pooled", "no rung 'int8.fp8 pooled'; there are: .* such as 'int8.fp8 pooled 0.3'")])
def test_pooled_keys_are_told_where_they_go(given, says):
    q = np.zeros((1, 64, 1, 32), np.float32)
    for take in (as_precision, Precision, lambda given: lowbit_video.attention(q, q, q, given)):
        with pytest.raises(ValueError, match=says):
            take(given)


def test_every_listed_precision_exists():
    assert len({Precision(spec) for spec in precision_specs()}) == 16
    with pytest.raises(TypeError, match="int"):
        as_precision(8)
    with pytest.raises(ValueError, match="granularity"):
        Precision("int8+fp16", granularity="row")
