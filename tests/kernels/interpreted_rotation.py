"""The rotating quantisers in Triton's CPU interpreter against the NumPy oracle, on plain NumPy memory.

Not collected by itself: `test_rotation_kernels.py` runs it in a process with TRITON_INTERPRET=1.
"""
from __future__ import annotations

import os
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_rotation_kernels.py"

from lowbit_video.kernels.buffers import Buffer  # noqa: E402
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, QK_FORMATS  # noqa: E402
from lowbit_video.kernels.launch import launch  # noqa: E402
from lowbit_video.kernels.operands import Operand, Packed, Sequences, codes_of  # noqa: E402
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


class Found(NamedTuple):
    """What the statistics of a call find."""

    q_mean: np.ndarray | None
    q_top: np.ndarray
    k_mean: np.ndarray | None
    k_top: np.ndarray
    v_scale: np.ndarray | None


def found_in(q, k, v=None, *, smooth_q=True, smooth_k=True, packed=None):
    """Found by the kernels. packed: of q, k and v of one "sequence" [1, H, T, D]."""
    count = packed and len(packed[0]) - 1
    given = {name: (count or x.shape[0], *x.shape[1:]) for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    sequences = packed and Packed(*(Sequences(buffer(cu), int(np.diff(cu).max())) for cu in packed))
    longest = dict.fromkeys("qkv") if packed is None else dict(zip("qkv", (sequences.q.longest, *[sequences.k.longest] * 2)))
    size = 3 * sum(int(np.prod(shapes.partial_shape(shape, longest[name]))) for name, shape in given.items())
    ranges = nan(size + 8192)  # nothing is to be written behind its end
    wanted = dict(q_mean=smooth_q, q_top=True, k_mean=smooth_k, k_top=True, v_scale=v is not None)
    made = {name: nan(*given[name[0]][:2], given[name[0]][3]) if asked else None for name, asked in wanted.items()}
    operands = [operand(x, given[name] if packed else None) if x is not None else None for name, x in zip("qkv", (q, k, v))]
    launch_channel_tops(buffer(ranges), *operands[:2], v=operands[2], packed=sequences,
                        **{name: buffer(array) for name, array in made.items()})
    assert not np.isnan(ranges[:size]).any() and np.isnan(ranges[size:]).all()
    assert not any(np.isnan(array).any() for array in made.values() if array is not None)
    return Found(**made)


def quantise(x, of, format, block, tops, group, shape=None, sequences=None, **options):
    """(codes, scales) by the kernel."""
    shape, packed = shape or x.shape, sequences is not None
    codes = np.full(shapes.code_shape(shape, format, packed), 0x7F, np.uint8)
    scale, given = nan(*shapes.scale_shape(shape, block, packed)), operand(x, shape if packed else None)
    made = codes_of(given, format, buffer(codes), buffer(scale), block, packed)
    launch_quant_rotated(given, made, sequences, tops=Tops(*map(buffer, tops)), of=of, group=group, **options)
    return codes, scale


@pytest.mark.parametrize("q_shape, k_shape", [((2, 4, 70, 64), (2, 2, 530, 64)), ((1, 1, 1, 128), (1, 1, 3, 128))], ids=str)
def test_means_tops_and_scales(q_shape, k_shape):
    q, k, v = draw(1, *q_shape), draw(2, *k_shape), np.ascontiguousarray(draw(3, *k_shape))
    for x in (q, k, v):
        x[:, :, -1] *= -3
    found, plain = found_in(q, k, v), found_in(q, k, smooth_q=False, smooth_k=False)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    for x, mean, top, plain_top in ((q, found.q_mean, found.q_top, plain.q_top), (k, found.k_mean, found.k_top, plain.k_top)):
        np.testing.assert_allclose(mean, reference.token_mean(x), atol=1e-5)
        np.testing.assert_array_equal(top, reference.channel_top(x, mean))
        np.testing.assert_array_equal(plain_top, reference.channel_top(x, None))
    np.testing.assert_allclose(found.v_scale, np.abs(v).max(2) / 448, rtol=2e-7)
    assert plain[0] is plain[2] is plain[4] is None


def test_a_channel_of_v_that_is_zero_has_the_scale_of_the_other_statistics():
    q = draw(1, 1, 1, 5, 64)
    np.testing.assert_allclose(found_in(q, q, 0 * q).v_scale, np.float32(1e-30) / 448, rtol=1e-6)


def test_statistics_of_sequences():
    q, k, v = (draw(seed, 1, heads, 700, 64) for seed, heads in ((1, 4), (2, 2), (3, 2)))
    cu_q, cu_k = np.array([0, 300, 300, 700], np.int32), np.array([0, 600, 600, 700], np.int32)
    found = found_in(q, k, v, packed=(cu_q, cu_k))
    for s in (0, 2):
        for x, cu, mean, top in ((q, cu_q, found.q_mean, found.q_top), (k, cu_k, found.k_mean, found.k_top)):
            rows = x[:, :, cu[s]:cu[s + 1]].astype(np.float32)
            np.testing.assert_allclose(mean[s], reference.token_mean(rows)[0], atol=1e-5)
            np.testing.assert_array_equal(top[s], reference.channel_top(rows, mean[s][None])[0])
        values = v[0, :, cu_k[s]:cu_k[s + 1]].astype(np.float32)
        np.testing.assert_allclose(found.v_scale[s], np.abs(values).max(1) / 448, rtol=2e-7)
    assert not any(array[1].any() for array in found[:4])


def test_ranges_of_more_chunks_than_are_folded_at_once():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, chunks, 3, 64), np.float32) for heads, chunks in ((3, 40), (2, 33), (2, 33)))
    ranges = np.concatenate([x.reshape(-1) for x in (q, k, v)])
    made = [nan(2, heads, 64) for heads in (3, 2, 3, 2, 2)]
    launch(fold_ranges_kernel, (2 * (3 + 2 + 2),), buffer(ranges), *map(buffer, made), None, None, 6, 4, 3, 2, 1000, 900, 40,
           33, D=64, FOLD=32, SMOOTH_Q=True, SMOOTH_K=False, VARLEN=False)
    q_mean, k_mean, q_top, k_top, v_scale = made
    np.testing.assert_allclose(q_mean, q[:, :, :, 0].sum(2) / 1000, atol=1e-6)
    assert np.isnan(k_mean).all()  # not asked for
    for x, mean, found in ((q, q_mean, q_top), (k, 0, k_top), (v, 0, v_scale * 448)):
        np.testing.assert_allclose(found, np.maximum(x[:, :, :, 1].max(2) - mean, mean - x[:, :, :, 2].min(2)), rtol=1e-6)


@pytest.mark.parametrize("format, block, dim", [
    *((format, 128 if format in ("int8", "fp8") else None, 64) for format in QK_FORMATS), ("int2", 128, 64), ("int8", 128, 128),
    ("int4", None, 128)])
def test_codes(format, block, dim):
    """With means where a row has a scale of its own."""
    dtype = ml_dtypes.bfloat16 if format == "int8" else np.float16
    heads = 2 if format == "int4" else 1
    q, k = draw(1, 1, 2 * heads, 5, dim, dtype=dtype), draw(2, 1, heads, 135 if block else 67, dim, dtype=dtype)
    q_mean, q_top, k_mean, k_top, _ = found_in(q, k, smooth_q=block is None, smooth_k=block is None)
    factors = reference.rotation(q_top, k_top)
    for x, of, mean, factor, rows in ((q, "q", q_mean, factors[0], None), (k, "k", k_mean, factors[1], block)):
        codes, scale = quantise(x, of, format, rows, (q_top, k_top), 2, mean=buffer(mean))
        wanted, wanted_scale = reference.quantize_rows(x.astype(np.float32), format, rows, mean, factor)
        np.testing.assert_allclose(scale, wanted_scale, rtol=2e-6)
        assert (codes != wanted.view(np.uint8)).mean() < 2e-3, of


def test_rows_past_the_end_do_not_count_in_the_last_blocks_scale():
    k = (draw(2, 1, 1, 130, 64).astype(np.float32) + 50).astype(np.float32)
    mean, top = found_in(k, k)[:2]
    _, scale = quantise(k, "k", "int8", 128, (top, top), 1, mean=buffer(mean))
    np.testing.assert_allclose(scale, reference.quantize_rows(k, "int8", 128, mean, np.ones_like(mean))[1], rtol=1e-5)


def test_corrections_of_smoothing_are_of_what_is_not_rotated():
    q, k = draw(1, 1, 4, 7, 64), draw(2, 1, 2, 9, 64)
    q_mean, q_top, k_mean, k_top, _ = found_in(q, k)
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
    mean, top = found_in(k, k, packed=(cu, cu))[:2]
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
    found = found_in(q, k, smooth_q=False, smooth_k=False)
    tops = found.q_top, found.k_top
    for x, of in ((q, "q"), (k, "k")):
        codes, scale = quantise(x, of, "int8", None, tops, 1)
        factors = reference.rotation(*tops)["qk".index(of)]
        wanted, wanted_scale = reference.quantize_rows(x.astype(np.float32), "int8", None, None, factors)
        np.testing.assert_allclose(scale, wanted_scale, rtol=1e-5)
        assert np.isfinite(scale).all() and (codes != wanted.view(np.uint8)).mean() < 2e-3
