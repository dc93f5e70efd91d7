"""The rotating quantisers in Triton's CPU interpreter against the NumPy oracle, on plain NumPy memory.

Not collected by itself: `test_rotation_kernels.py` runs it in a process with TRITON_INTERPRET=1.
"""
from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_rotation_kernels.py"

from lowbit_video.kernels.buffers import Buffer  # noqa: E402
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, QK_FORMATS  # noqa: E402
from lowbit_video.kernels.launch import launch  # noqa: E402
from lowbit_video.kernels.operands import Operand, Sequences, codes_of  # noqa: E402
from lowbit_video.kernels.quant import reference, shapes  # noqa: E402
from lowbit_video.kernels.quant.channel_tops import fold_ranges_kernel, launch_channel_tops  # noqa: E402
from lowbit_video.kernels.quant.quant_rotated import Tops, launch_quant_rotated  # noqa: E402

import quick_interpreter  # noqa: E402, F401


def buffer(array):
    return None if array is None else Buffer(array.ctypes.data, array.dtype.name)


def nan(*shape):
    return np.full(shape, np.nan, np.float32)


def draw(seed, *shape, dtype=np.float16):
    """Normal values [B, H, N, D] as views of [B, N, H, D] memory; a mean, and two channels that are larger in each head."""
    batch, heads, tokens, dim = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, tokens, heads, dim), np.float32) + rng.standard_normal((1, 1, heads, dim), np.float32)
    for head in range(heads):
        x[:, :, head, [3 + seed + head, 40 + head]] *= 12
    return x.astype(dtype).swapaxes(1, 2)


def operand(x, shape=None):
    b, h, n, _ = (stride // x.itemsize for stride in x.strides)
    return Operand(buffer(x), shape or x.shape, (0 if shape else b, h, n), FORMAT_OF_DTYPE[x.dtype.name])


def tops_of(x, smooth, shape=None, sequences=None):
    """(mean or None, top) by the kernels."""
    shape = shape or x.shape
    ranges = nan(3, *shapes.partial_shape(shape, sequences and sequences.longest))
    found = [nan(*shape[:2], shape[3]) for _ in range(2)]
    launch_channel_tops(operand(x, shape if sequences else None), buffer(ranges), buffer(found[1]),
                        buffer(found[0]) if smooth else None, sequences)
    assert not np.isnan(ranges).any()
    return (found[0] if smooth else None), found[1]


def quantise(x, of, format, block, tops, group, shape=None, sequences=None, **options):
    """(codes, scales) by the kernel."""
    shape, packed = shape or x.shape, sequences is not None
    codes = np.full(shapes.code_shape(shape, format, packed), 0x7F, np.uint8)
    scale, given = nan(*shapes.scale_shape(shape, block, packed)), operand(x, shape if packed else None)
    made = codes_of(given, format, buffer(codes), buffer(scale), block, packed)
    launch_quant_rotated(given, made, sequences, tops=Tops(*map(buffer, tops)), of=of, group=group, **options)
    return codes, scale


@pytest.mark.parametrize("shape", [(2, 2, 70, 64), (1, 1, 1, 128), (1, 1, 520, 64)], ids=str)
def test_means_and_tops(shape):
    x = draw(1, *shape)
    x[:, :, -1] *= 3
    wide = x.astype(np.float32)
    mean, top = tops_of(x, smooth=True)
    np.testing.assert_allclose(mean, reference.token_mean(wide), atol=1e-5)
    np.testing.assert_array_equal(top, reference.channel_top(wide, mean))
    np.testing.assert_array_equal(tops_of(x, smooth=False)[1], reference.channel_top(wide, None))


def test_means_and_tops_of_sequences():
    x = draw(1, 1, 2, 700, 64)
    cu = np.array([0, 600, 600, 700], np.int32)
    mean, top = tops_of(x, True, (3, 2, 700, 64), Sequences(buffer(cu), 600))
    for s, part in enumerate((slice(0, 600), slice(600, 700))):
        rows = x[:, :, part].astype(np.float32)
        np.testing.assert_allclose(mean[2 * s], reference.token_mean(rows)[0], atol=1e-5)
        np.testing.assert_array_equal(top[2 * s], reference.channel_top(rows, mean[2 * s][None])[0])
    assert not mean[1].any() and not top[1].any()


def test_ranges_of_more_chunks_than_are_folded_at_once():
    ranges = np.random.default_rng(0).standard_normal((2, 3, 40, 3, 64), np.float32)
    mean, top = nan(2, 3, 64), nan(2, 3, 64)
    launch(fold_ranges_kernel, (3, 2), buffer(ranges), buffer(mean), buffer(top), None, 3, 1000, 40, D=64, FOLD=32, SMOOTH=True,
           VARLEN=False)
    np.testing.assert_allclose(mean, ranges[:, :, :, 0].sum(2) / 1000, atol=1e-6)
    most, least = ranges[:, :, :, 1].max(2), ranges[:, :, :, 2].min(2)
    np.testing.assert_allclose(top, np.maximum(most - mean, mean - least), rtol=1e-6)


@pytest.mark.parametrize("format, block, dim", [
    *((format, 128 if format in ("int8", "fp8") else None, 64) for format in QK_FORMATS), ("int2", 128, 64), ("int8", 128, 128),
    ("int4", None, 128)])
def test_codes(format, block, dim):
    """With means where a row has a scale of its own."""
    dtype = ml_dtypes.bfloat16 if format == "int8" else np.float16
    heads = 2 if format == "int4" else 1
    q, k = draw(1, 1, 2 * heads, 5, dim, dtype=dtype), draw(2, 1, heads, 135 if block else 67, dim, dtype=dtype)
    (q_mean, q_top), (k_mean, k_top) = tops_of(q, block is None), tops_of(k, block is None)
    factors = reference.rotation(q_top, k_top)
    for x, of, mean, factor, rows in ((q, "q", q_mean, factors[0], None), (k, "k", k_mean, factors[1], block)):
        codes, scale = quantise(x, of, format, rows, (q_top, k_top), 2, mean=buffer(mean))
        wanted, wanted_scale = reference.quantize_rows(x.astype(np.float32), format, rows, mean, factor)
        np.testing.assert_allclose(scale, wanted_scale, rtol=2e-6)
        assert (codes != wanted.view(np.uint8)).mean() < 2e-3, of


def test_rows_past_the_end_do_not_count_in_the_last_blocks_scale():
    k = (draw(2, 1, 1, 130, 64).astype(np.float32) + 50).astype(np.float32)
    mean, top = tops_of(k, True)
    _, scale = quantise(k, "k", "int8", 128, (top, top), 1, mean=buffer(mean))
    np.testing.assert_allclose(scale, reference.quantize_rows(k, "int8", 128, mean, np.ones_like(mean))[1], rtol=1e-5)


def test_corrections_of_smoothing_are_of_what_is_not_rotated():
    q, k = draw(1, 1, 4, 7, 64), draw(2, 1, 2, 9, 64)
    (q_mean, q_top), (k_mean, k_top) = tops_of(q, True), tops_of(k, True)
    shift, bias = nan(1, 4, 7), nan(1, 4, 9)
    quantise(q, "q", "int4", None, (q_top, k_top), 2, mean=buffer(q_mean), lse_shift=buffer(shift), k_mean=buffer(k_mean),
             sm_scale=0.125)
    quantise(k, "k", "int4", None, (q_top, k_top), 2, mean=buffer(k_mean), bias=buffer(bias), q_mean=buffer(q_mean))
    wide = q.astype(np.float32), k.astype(np.float32)
    np.testing.assert_allclose(shift, 0.125 * np.einsum("bhnd,bhd->bhn", wide[0], k_mean.repeat(2, axis=1)), atol=2e-4)
    np.testing.assert_allclose(bias, reference.score_bias(q_mean, wide[1], k_mean), atol=2e-3)


def test_packed_sequences_have_tops_and_blocks_of_their_own():
    k, cu = draw(2, 1, 2, 301, 64), np.array([0, 131, 131, 300, 301], np.int32)
    shape, sequences = (4, 2, 301, 64), Sequences(buffer(cu), 169)
    mean, top = tops_of(k, True, shape, sequences)
    other = np.ascontiguousarray(top[:, ::-1])
    codes, scale = quantise(k, "k", "int8", 128, (other, top), 1, shape, sequences, mean=buffer(mean))
    for s in (0, 2, 3):
        rows = slice(cu[s], cu[s + 1])
        factors = reference.rotation(other[s:s + 1], top[s:s + 1])[1]
        wanted, wanted_scale = reference.quantize_rows(k[:, :, rows].astype(np.float32), "int8", 128, mean[s:s + 1], factors)
        first = cu[s] // 128 + s
        np.testing.assert_allclose(scale[:, first:first + wanted_scale.shape[2]], wanted_scale[0], rtol=2e-6)
        assert (codes[:, rows] != wanted[0].view(np.uint8)).mean() < 2e-3


def test_channels_and_rows_of_zeros():
    q, k = draw(1, 1, 1, 70, 64), draw(2, 1, 1, 70, 64)
    q[..., 5], k[..., 5], k[..., 9], q[..., 11], k[:, :, 30] = 0, 0, 0, 0, 0
    tops = tops_of(q, False)[1], tops_of(k, False)[1]
    for x, of in ((q, "q"), (k, "k")):
        codes, scale = quantise(x, of, "int8", None, tops, 1)
        factors = reference.rotation(*tops)["qk".index(of)]
        wanted, wanted_scale = reference.quantize_rows(x.astype(np.float32), "int8", None, None, factors)
        np.testing.assert_allclose(scale, wanted_scale, rtol=1e-5)
        assert np.isfinite(scale).all() and (codes != wanted.view(np.uint8)).mean() < 2e-3
