"""The fused prologue's kernels in Triton's CPU interpreter against the NumPy oracle, on plain NumPy memory.

Not collected by itself: `test_prologue_kernels.py` runs it in a process with TRITON_INTERPRET=1.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_prologue_kernels.py"
sys.path.append(str(Path(__file__).parents[1]))

from interpreted_portable import buffer, operand, poisoned, quantise  # noqa: E402

from lowbit_video.kernels.formats import QK_FORMATS  # noqa: E402
from lowbit_video.kernels.operands import codes_of, v_codes_of  # noqa: E402
from lowbit_video.kernels.prologue import reference  # noqa: E402
from lowbit_video.kernels.prologue.apart import launch_prologue_apart  # noqa: E402
from lowbit_video.kernels.prologue.quant import launch_prologue_quant  # noqa: E402
from lowbit_video.kernels.prologue.stats import launch_prologue_stats  # noqa: E402
from lowbit_video.kernels.prologue.steps import Norm, Rest, Rotary, Steps, mapped, partial_count, why_not  # noqa: E402
from lowbit_video.kernels.prologue.values import launch_prologue_values  # noqa: E402
from lowbit_video.kernels.quant import reference as quant  # noqa: E402
from lowbit_video.kernels.quant import shapes  # noqa: E402
from lowbit_video.kernels.quant.quant_v import launch_quant_v  # noqa: E402

TIES = 5e-4
"""Of all codes, the share that may differ by one: where float32 sums in another order round a 16-bit step otherwise.

Seen on 16 tensors of 358400 codes in float16: 0 to 9e-5; in bfloat16, whose steps are coarser, 6e-4.
"""


def draw(shape, dtype=np.float16, seed=0):
    """q, k, v [B, H, N, D] as views of one projection [B, N, 3, H, D]; K has a mean, the last token is large."""
    batch, heads, tokens, dim = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, tokens, 3, heads, dim), np.float32)
    x[:, :, 1] += 2 * rng.standard_normal((heads, dim), np.float32)
    x[:, -1] *= 2.5
    x = x.astype(dtype)
    return [x[:, :, part].swapaxes(1, 2) for part in range(3)]


def steps_of(kind, dim, rotary=None, dtype=np.float16, affine=True, rounds_first=False, seed=5):
    """Steps whose tensors are arrays: two norms of one kind, and positions of `rotary` = (begin, tokens)."""
    rng = np.random.default_rng(seed)
    norms = [None, None]
    if kind:
        part = lambda around: (around + 0.3 * rng.standard_normal(dim)).astype(dtype) if affine else None
        norms = [Norm(kind, 1e-6, part(1), part(0.5) if kind == "layer" else None, rounds_first) for _ in "qk"]
    if rotary is not None:
        begin, tokens = rotary
        angles = np.repeat(rng.uniform(0, 6, (tokens, dim // 2)), 2, 1)
        rotary = Rotary(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), begin, tokens)
    return Steps(*norms, rotary)


def as_buffers(steps):
    return mapped(steps, lambda name, array: operand(array) if name.endswith("rest") else buffer(array))


def in_two(qkv, seam):
    """Q, K and V up to a token, each in memory of its own behind which nothing is a number, and the rest, cut out of one."""
    heads = [np.ascontiguousarray(x[:, :, :seam].swapaxes(1, 2)) for x in qkv]
    first = []
    for x in heads:
        wide = np.full((x.shape[0], seam + 130, x.shape[2], x.shape[3]), np.nan, x.dtype)
        wide[:, :seam] = x
        first.append(wide[:, :seam].swapaxes(1, 2))
    rest = np.stack([x[:, :, seam:].swapaxes(1, 2) for x in qkv], 2)
    return first, Rest(*(rest[:, :, part].swapaxes(1, 2) for part in range(3)))


class Run:
    """Both readings by the launchers; what each leaves lies under its name."""

    def __init__(self, qkv, steps, formats=("int8", "int8"), block=128, smooth_q=False, corrections=False, how=None):
        q, k, v = qkv
        batch, heads, tokens, dim = q.shape
        tokens += steps.rest.q.shape[2] if steps.rest else 0
        whole = lambda x: operand(x)._replace(shape=(batch, heads, tokens, dim))
        assert why_not(steps, whole(q).shape, whole(k).shape, q.dtype.name) is None
        given, self.kept = as_buffers(steps), (steps, qkv)
        self.partial = poisoned((partial_count(whole(q).shape) * (2 + smooth_q),))
        self.q_mean, self.k_mean, self.v_scale = (poisoned((batch, heads, dim)) for _ in range(3))
        launch_prologue_stats(*map(whole, qkv), given, buffer(self.partial), k_mean=buffer(self.k_mean),
                              v_scale=buffer(self.v_scale), q_mean=buffer(self.q_mean) if smooth_q else None,
                              how=how)
        self.codes, self.scale, made = [], [], []
        for x, format, rows in zip((q, k), formats, (None, block)):
            self.codes.append(poisoned(shapes.code_shape(whole(x).shape, format), np.uint8))
            self.scale.append(poisoned(shapes.scale_shape(whole(x).shape, rows)))
            made.append(codes_of(whole(x), format, buffer(self.codes[-1]), buffer(self.scale[-1]), rows))
        self.shift, self.bias = poisoned((batch, heads, tokens)), poisoned((batch, heads, tokens))
        launch_prologue_quant(whole(q), whole(k), *made, given, k_mean=buffer(self.k_mean),
                              q_mean=buffer(self.q_mean) if smooth_q else None,
                              lse_shift=buffer(self.shift) if corrections else None,
                              score_bias=buffer(self.bias) if corrections and smooth_q else None, sm_scale=0.125,
                              how=how)
        self.v_codes = poisoned(shapes.v_code_shape(whole(v).shape), np.uint8)
        codes = v_codes_of(whole(v), buffer(self.v_codes), buffer(self.v_scale))
        launch_prologue_values(whole(v), codes, given) if steps.rest else launch_quant_v(whole(v), codes)


def prepared(qkv, steps):
    dtype = qkv[0].dtype.name
    return [reference.prepared(x.astype(np.float32), norm, steps.rotary, dtype)
            for x, norm in zip(qkv, (steps.q_norm, steps.k_norm))]


def levels(codes, format):
    """Codes as numbers of levels, one apart."""
    if format == "fp8":
        bits = codes.view(np.uint8).astype(np.int16)
        return np.where(bits & 0x80, -(bits & 0x7F), bits)
    values = quant.decode(codes.view(np.int8) if format == "int8" else codes, format)
    return values if format == "int8" else values / 2


def assert_codes(run, number, wanted, wanted_scale, format, ties=TIES):
    np.testing.assert_allclose(run.scale[number], wanted_scale, rtol=2e-3)
    assert np.isfinite(run.scale[number]).all()
    off = np.abs(levels(run.codes[number], format) - levels(wanted.view(np.uint8), format))
    assert off.max() <= 1 and (off > 0).mean() <= ties, (off.max(), (off > 0).mean())


CASES = [
    ((2, 3, 130, 64), "layer", (3, 127), "int8", 128, {}), ((1, 7, 128, 64), "layer", None, "int8", None, {}),
    ((1, 1, 1, 128), "rms", (0, 1), "int8", 128, {}), ((1, 2, 257, 32), "rms", (0, 200), "int8", 128, {"rounds_first": True}),
    ((1, 1, 140, 64), None, (20, 100), "fp8", 128, {}), ((1, 2, 70, 128), "layer", (5, 65), "int4", None, {"affine": False}),
    ((1, 1, 129, 64), "rms", None, "int2", 128, {}), ((1, 1, 66, 32), "layer", (2, 64), "int2", None, {})]
"""[B, H, N, D], norm, rotary tokens, format, rows that share a scale of K, more of the norm: ragged ends, each piece once."""


@pytest.mark.parametrize("shape, kind, rotary, format, block, more", CASES, ids=str)
def test_statistics_and_codes(shape, kind, rotary, format, block, more):
    qkv, steps = draw(shape), steps_of(kind, shape[3], rotary, **more)
    run, (q, k) = Run(qkv, steps, (format, format), block), prepared(qkv, steps)
    np.testing.assert_allclose(run.k_mean, quant.token_mean(k), atol=2e-5)
    np.testing.assert_array_equal(run.v_scale, quant.v_scale(qkv[2].astype(np.float32)))
    assert_codes(run, 0, *quant.quantize_rows(q, format, None), format)
    assert_codes(run, 1, *quant.quantize_rows(k, format, block, quant.token_mean(k)), format)


@pytest.mark.parametrize("dtype, kind", [(ml_dtypes.bfloat16, "layer"), (np.float32, "rms")])
def test_other_dtypes(dtype, kind):
    """In float32 nothing is rounded on the way; bfloat16 rounds coarsely, and a weight may be float32 beside it."""
    qkv, steps = draw((1, 2, 131, 64), dtype), steps_of(kind, 64, (3, 120), np.float32)
    run, (q, k), ties = Run(qkv, steps), prepared(qkv, steps), 2e-3 if dtype == ml_dtypes.bfloat16 else TIES
    assert_codes(run, 0, *quant.quantize_rows(q, "int8", None), "int8", ties)
    assert_codes(run, 1, *quant.quantize_rows(k, "int8", 128, quant.token_mean(k)), "int8", ties)


@pytest.mark.parametrize("format", QK_FORMATS)
def test_without_steps_codes_are_those_of_the_quantisers(format):
    """To the bit: what stands in this kernel is what stands in theirs."""
    qkv = draw((1, 2, 131, 32))
    for block in (128, None):
        run = Run(qkv, Steps(), (format, format), block, smooth_q=True)
        for number, rows, mean in ((0, None, run.q_mean), (1, block, run.k_mean)):
            _, codes, scale = quantise(qkv[number], format, rows, mean=buffer(mean))
            np.testing.assert_array_equal(run.codes[number], codes)
            np.testing.assert_array_equal(run.scale[number], scale)


@pytest.mark.parametrize("rotary", [None, (4, 60)])
def test_what_smoothing_takes(rotary):
    qkv, steps = draw((1, 3, 70, 64)), steps_of("layer", 64, rotary)
    run, (q, k) = Run(qkv, steps, ("int4", "int8"), smooth_q=True, corrections=True, how=(2, 4)), prepared(qkv, steps)
    q_mean, k_mean = quant.token_mean(q), quant.token_mean(k)
    np.testing.assert_allclose(run.q_mean, q_mean, atol=2e-5)
    np.testing.assert_allclose(run.shift, 0.125 * np.einsum("bhnd,bhd->bhn", q, k_mean), atol=2e-3)
    np.testing.assert_allclose(run.bias, quant.score_bias(q_mean, k, k_mean), atol=2e-2)
    assert_codes(run, 0, *quant.quantize_rows(q, "int4", None, q_mean), "int4")
    assert_codes(run, 1, *quant.quantize_rows(k, "int8", 128, k_mean), "int8")


def test_heads_that_share_tables_change_nothing():
    qkv, steps = draw((1, 5, 130, 32)), steps_of("rms", 32, (2, 128))
    alone, some = Run(qkv, steps, how=(1, 4)), Run(qkv, steps, how=(3, 8))
    for name in ("codes", "scale"):
        for one, other in zip(getattr(alone, name), getattr(some, name)):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(alone.k_mean, some.k_mean)


PIECES = [
    ((1, 2, 300, 64), np.float16, "layer", (226, 74), 226, "int8"), ((2, 1, 130, 32), np.float16, "layer", (1, 129), 1, "int8"),
    ((1, 1, 257, 64), ml_dtypes.bfloat16, "rms", (256, 1), 256, "fp8"),
    ((1, 1, 256, 128), ml_dtypes.bfloat16, "layer", (255, 1), 255, "int8"),
    ((1, 2, 131, 128), np.float16, "rms", None, 128, "int4"), ((1, 1, 140, 32), np.float32, "layer", (0, 60), 60, "int2"),
    ((1, 7, 30, 32), np.float16, None, (10, 20), 29, "int8")]
"""[B, H, N, D], dtype, norm, rotary tokens, tokens of the first piece, format: seams at, before and behind a tile's edge."""


@pytest.mark.parametrize("shape, dtype, kind, rotary, seam, format", PIECES, ids=str)
def test_two_pieces_leave_what_one_does(shape, dtype, kind, rotary, seam, format):
    """To the bit, all that is written; the pieces' strides differ."""
    qkv, steps = draw(shape, dtype), steps_of(kind, shape[3], rotary, dtype)
    more = dict(formats=(format, format), block=None if format == "int4" else 128, smooth_q=True, corrections=True)
    first, rest = in_two(qkv, seam)
    one, two = Run(qkv, steps, **more), Run(first, steps._replace(rest=rest), **more)
    for name in ("q_mean", "k_mean", "v_scale", "v_codes", "shift", "bias"):
        np.testing.assert_array_equal(getattr(two, name), getattr(one, name), name)
    for number in range(2):
        np.testing.assert_array_equal(two.codes[number], one.codes[number])
        np.testing.assert_array_equal(two.scale[number], one.scale[number])


APART = [((2, 5, 130, 64), np.float16, "layer", (3, 127), (2, 4)), ((1, 7, 128, 64), ml_dtypes.bfloat16, "layer", None, None),
         ((1, 1, 1, 128), np.float16, "rms", (0, 1), None), ((1, 2, 257, 32), np.float32, "rms", (1, 200), None),
         ((1, 2, 129, 128), np.float16, None, (20, 100), (1, 8))]
"""[B, H, N, D], dtype, norm, rotary tokens, how it is built."""


@pytest.mark.parametrize("shape, dtype, kind, rotary, how", APART, ids=str)
def test_steps_apart(shape, dtype, kind, rotary, how):
    """Each element but for rounding ties; Q's and K's outputs have strides of their own, behind which nothing is written."""
    qkv, steps = draw(shape, dtype), steps_of(kind, shape[3], rotary, dtype, rounds_first=kind == "rms")
    batch, heads, tokens, dim = shape
    memory = [np.full(size, -77, dtype) for size in ((batch, tokens + 3, heads, dim), (batch, heads, tokens + 5, dim))]
    outs = [memory[0][:, :tokens].swapaxes(1, 2), memory[1][:, :, :tokens]]
    launch_prologue_apart(*map(operand, (*qkv[:2], *outs)), as_buffers(steps), how)
    for out, wanted, whole in zip(outs, prepared(qkv, steps), memory):
        out, whole = out.astype(np.float32), whole.astype(np.float32)
        step = {np.float16: 2.0**-10, ml_dtypes.bfloat16: 2.0**-7, np.float32: 1e-5}[dtype]
        # a tie before positions is one of a pair's larger half
        assert (np.abs(out - wanted) <= step * np.abs(wanted).max(-1, keepdims=True)).all()
        assert dtype == np.float32 or (out != wanted).mean() <= (2e-3 if dtype == ml_dtypes.bfloat16 else TIES)
        assert (whole == -77).sum() == whole.size - out.size


def test_every_row_is_near_its_ideal():
    """Row by row against float64 without any rounding: half of a step of 127 to the row's largest value, and float16's own."""
    qkv, steps = draw((1, 2, 130, 64), seed=3), steps_of("layer", 64, (4, 126), np.float32)
    run = Run(qkv, steps)
    for number, (x, norm) in enumerate(zip(qkv, (steps.q_norm, steps.k_norm))):
        x = x.astype(np.float64)
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * norm.weight + norm.bias
        pairs = x[:, :, 4:].reshape(1, 2, 126, 32, 2)
        pairs = (pairs[..., 0] + 1j * pairs[..., 1]) * (steps.rotary.cos + 1j * steps.rotary.sin)[:, ::2]
        x[:, :, 4:] = np.stack([pairs.real, pairs.imag], -1).reshape(1, 2, 126, 64)
        scale = quant.expand_scale(run.scale[number], 130, (None, 128)[number])[..., None]
        values = run.codes[number].view(np.int8) * scale + (run.k_mean[:, :, None] if number else 0)
        bound = 0.5 * scale + 2.0**-10 * np.abs(x).max(-1, keepdims=True) + 1e-4
        assert (np.abs(values - x) <= bound).all(), (np.abs(values - x) / bound).max()


def test_rows_past_the_end_do_not_count():
    """A LayerNorm's bias makes a row of zeros one of 50, which the mean and the last block's scale must not see."""
    qkv, steps = draw((1, 1, 131, 64)), steps_of("layer", 64)
    steps = steps._replace(k_norm=steps.k_norm._replace(bias=np.full(64, 50, np.float16)))
    run, (_, k) = Run(qkv, steps), prepared(qkv, steps)
    np.testing.assert_allclose(run.k_mean, quant.token_mean(k), rtol=1e-5)
    np.testing.assert_allclose(run.scale[1], quant.quantize_rows(k, "int8", 128, quant.token_mean(k))[1], rtol=5e-3)


def test_only_what_is_wanted_is_written():
    qkv, steps = draw((1, 2, 130, 64)), steps_of("layer", 64, (2, 128))
    q, k, v = map(operand, qkv)
    both, alone = (poisoned((1, 2, 64)) for _ in range(2))
    partial = poisoned((3 * partial_count(k.shape),))
    launch_prologue_stats(q, k, v, as_buffers(steps), buffer(partial), v_scale=buffer(both))
    np.testing.assert_array_equal(both, quant.v_scale(qkv[2].astype(np.float32)))
    assert np.isnan(partial[partial_count(k.shape):]).all()
    launch_prologue_stats(q, k, v, as_buffers(steps), buffer(partial), q_mean=buffer(alone))
    np.testing.assert_allclose(alone, quant.token_mean(prepared(qkv, steps)[0]), atol=2e-5)


def test_rows_of_zeros():
    qkv, steps = draw((1, 1, 130, 64)), steps_of("rms", 64)
    qkv[0][:, :, 3], qkv[1][:, :, :] = 0, 0
    run = Run(qkv, steps)
    assert np.isfinite(run.scale[0]).all() and np.isfinite(run.scale[1]).all()
    assert not run.codes[1].any() and not run.codes[0][:, :, 3].any() and run.codes[0][:, :, 4].any()
