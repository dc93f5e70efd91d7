"""The fused prologue's oracle against float64 and against complex numbers; why the kernels do not serve."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lowbit_video.kernels.prologue import reference
from lowbit_video.kernels.prologue.steps import Norm, Rotary, Steps, why_not

RNG = np.random.default_rng(2)
X = (3 * RNG.standard_normal((2, 3, 9, 16)) + 1).astype(np.float32)
WEIGHT, BIAS = RNG.standard_normal(16).astype(np.float32), RNG.standard_normal(16).astype(np.float32)


def ideal_norm(x, kind, eps, weight=1.0, bias=0.0):
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + bias


def table(tokens, dim=16):
    angles = np.repeat(RNG.uniform(0, 6, (tokens, dim // 2)), 2, 1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norms(kind, eps):
    found = reference.normed(X, Norm(kind, eps, WEIGHT, BIAS), "float32")
    np.testing.assert_allclose(found, ideal_norm(X, kind, eps, WEIGHT, BIAS), atol=3e-6)
    np.testing.assert_allclose(reference.normed(X, Norm(kind, eps), "float32"), ideal_norm(X, kind, eps), atol=3e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_step_rounds_as_a_framework_does(dtype):
    """Once behind a norm; before the weight too where it says so; once behind positions."""
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    once = ideal_norm(X, "rms", 1e-6, WEIGHT).astype(np.float32).astype(kind)
    twice = (ideal_norm(X, "rms", 1e-6).astype(np.float32).astype(kind) * WEIGHT.astype(kind)).astype(kind)
    weight = WEIGHT.astype(kind).astype(np.float32)
    found = reference.normed(X, Norm("rms", 1e-6, weight, None, True), dtype)
    assert (found != twice.astype(np.float32)).mean() < 0.01 and (found != once.astype(np.float32)).mean() > 0.1
    assert (reference.normed(X, Norm("rms", 1e-6, WEIGHT), dtype) != once.astype(np.float32)).mean() < 0.01
    cos, sin = table(9)
    turned = reference.turned(found, Rotary(cos, sin, 0, 9), dtype)
    assert (turned == turned.astype(kind).astype(np.float32)).all() and (turned != found).mean() > 0.9


def test_positions_turn_pairs_of_their_tokens_alone():
    cos, sin = table(5)
    found = reference.turned(X, Rotary(cos, sin, 3, 5), "float32")
    pairs = (X[:, :, 3:8, ::2] + 1j * X[:, :, 3:8, 1::2]) * (cos + 1j * sin)[:, ::2]
    np.testing.assert_array_equal(found[:, :, [0, 1, 2, 8]], X[:, :, [0, 1, 2, 8]])
    np.testing.assert_allclose(found[:, :, 3:8, ::2], pairs.real, atol=1e-6)
    np.testing.assert_allclose(found[:, :, 3:8, 1::2], pairs.imag, atol=1e-6)


def test_norm_first_then_positions():
    cos, sin = table(9)
    norm, rotary = Norm("layer", 1e-6, WEIGHT, BIAS), Rotary(cos, sin, 0, 9)
    wanted = reference.turned(reference.normed(X, norm, "float32"), rotary, "float32")
    np.testing.assert_array_equal(reference.prepared(X, norm, rotary, "float32"), wanted)
    np.testing.assert_array_equal(reference.prepared(X, None, None, "float32"), X)


SHAPE = (1, 2, 20, 64)
LAYER = Norm("layer", 1e-6, WEIGHT, BIAS)


@pytest.mark.parametrize("steps, shapes, dtype, reason", [
    (Steps(), (SHAPE, (1, 2, 21, 64)), "float16", "one shape is read"),
    (Steps(), (SHAPE, (1, 1, 20, 64)), "float16", "k [1, 1, 20, 64]: one shape"),
    (Steps(), ((1, 2, 20, 72),) * 2, "float16", "head dim 72 is not among 32, 64, 128"),
    (Steps(), (SHAPE,) * 2, "float64", "dtype float64"),
    (Steps(Norm("group", 1e-6), Norm("group", 1e-6)), (SHAPE,) * 2, "float16", "'group' is not among layer, rms"),
    (Steps(LAYER, None), (SHAPE,) * 2, "float16", "not of one kind"),
    (Steps(LAYER, LAYER._replace(eps=1e-5)), (SHAPE,) * 2, "float16", "not of one kind"),
    (Steps(LAYER, LAYER._replace(bias=None)), (SHAPE,) * 2, "float16", "not of one kind"),
    (Steps(rotary=Rotary(None, None, 3, 18)), (SHAPE,) * 2, "float16", "18 rotary positions from token 3 on"),
    (Steps(rotary=Rotary(None, None, -1, 18)), (SHAPE,) * 2, "float16", "do not lie among 20 tokens")], ids=str)
def test_why_not(steps, shapes, dtype, reason):
    assert reason in why_not(steps, *shapes, dtype)


@pytest.mark.parametrize("steps", [Steps(), Steps(LAYER, LAYER._replace(weight=BIAS)), Steps(rotary=Rotary(None, None, 2, 18))])
def test_what_is_served(steps):
    assert why_not(steps, SHAPE, SHAPE, "float16") is None
