"""The portable Triton kernels in Triton's CPU interpreter against the NumPy oracle, on plain NumPy memory.

Not collected by itself: `test_portable_interpreted.py` runs it in a process with TRITON_INTERPRET=1, which Triton
reads when a kernel is defined. No framework is needed: a Buffer on an array's memory is what launchers take.
"""
from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_portable_interpreted.py"

from lowbit_video.kernels.attention.portable import launch_attn_fwd  # noqa: E402
from lowbit_video.kernels.attention.reference import attn_fwd, lowbit_attention  # noqa: E402
from lowbit_video.kernels.buffers import Buffer  # noqa: E402
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, QK_FORMATS, scale_block  # noqa: E402
from lowbit_video.kernels.operands import Operand, Packed, Sequences, codes_of, v_codes_of  # noqa: E402
from lowbit_video.kernels.quant import reference, shapes  # noqa: E402
from lowbit_video.kernels.quant.quant_qk import launch_quant_qk  # noqa: E402
from lowbit_video.kernels.quant.quant_v import launch_quant_v  # noqa: E402
from lowbit_video.kernels.quant.token_stats import launch_stats  # noqa: E402
from lowbit_video.kernels.tuning import TileConfig  # noqa: E402

import quick_interpreter  # noqa: E402, F401
from helpers import EDGES_OF_TILES, drawn_to_the_diagonal  # noqa: E402

TILE = TileConfig(64, 128, 4, 2)  # the oracle's own tile, so that P is rounded against the same running maxima
TMA, POINTERS = (9, 0), (8, 9)
SPECS = [(q, k, pv) for q, k in (("int8", "int8"), ("fp8", "fp8"), ("int4", "int4"), ("int2", "int2"), ("int8", "int4"),
                                 ("int8", "int2")) for pv in ("fp16", "fp8")]


def buffer(array, dtype=None):
    return None if array is None else Buffer(array.ctypes.data, dtype or array.dtype.name)


def strides(array):
    return tuple(s // array.itemsize for s in array.strides[:3])


def poisoned(shape, dtype=np.float32):
    """Memory in which an element that nobody wrote shows."""
    return np.full(shape, np.nan, dtype) if np.issubdtype(dtype, np.floating) else np.full(shape, 0x7F, dtype)


def draw(seed, *shape, dtype=np.float16, layout="HND"):
    """Normal values [B, H, N, D]; NHD gives a view of [B, N, H, D] memory."""
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if layout == "NHD":
        return np.ascontiguousarray(x.swapaxes(1, 2)).astype(dtype).swapaxes(1, 2)
    return x.astype(dtype)


def draw_qkv(q_shape, kv_shape, seed=0, **options):
    offset = 2 * np.random.default_rng(seed + 9).standard_normal((1, kv_shape[1], 1, kv_shape[3]), dtype=np.float32)
    k = draw(seed + 1, *kv_shape, **options)
    k += offset.astype(k.dtype)
    return draw(seed, *q_shape, **options), k, draw(seed + 2, *kv_shape, **options)


def operand(x, shape=None):
    """What launchers take of an array [B, H, N, D]; shape: of packed sequences."""
    packed = shape is not None and shape != x.shape
    return Operand(buffer(x), shape or x.shape, (0, *strides(x)[1:]) if packed else strides(x), FORMAT_OF_DTYPE[x.dtype.name])


def quantise(x, format, block, shape=None, sequences=None, **options):
    """The codes' operand, its codes and its scales."""
    shape, packed = shape or x.shape, sequences is not None
    codes = poisoned(shapes.code_shape(shape, format, packed), np.uint8)
    scale = poisoned(shapes.scale_shape(shape, block, packed))
    made = codes_of(operand(x, shape), format, buffer(codes), buffer(scale), block, packed)
    launch_quant_qk(operand(x, shape), made, sequences, **options)
    return made, codes, scale


def one_statistic(x, shape, sequences, name, result):
    partial = poisoned(shapes.partial_shape(shape, sequences and sequences.longest))
    found = poisoned((*shape[:2], shape[3]))
    launch_stats(buffer(partial), **{name: operand(x, shape), result: buffer(found)},
                 packed=sequences and Packed(sequences, sequences))
    return found


def token_mean(x, shape=None, sequences=None):
    return one_statistic(x, shape or x.shape, sequences, "k", "k_mean")


def quantise_v(v, shape=None, sequences=None):
    shape, packed = shape or v.shape, sequences is not None
    scale = one_statistic(v, shape, sequences, "v", "v_scale")
    codes = poisoned(shapes.v_code_shape(shape, packed), np.uint8)
    made = v_codes_of(operand(v, shape), buffer(codes), buffer(scale), packed)
    launch_quant_v(operand(v, shape), made, sequences)
    return made, codes, scale


def attend(q, k, v, q_format, k_format, pv, granularity="block", smooth_q=False, causal=False, arch=TMA, tile=TILE,
           out_dtype=np.float32, cu=None):
    """(out, lse) by the launchers, from quantising to the end. cu: (cu_q, cu_k) for packed [1, H, T, D] arrays."""
    q_shape, kv_shape, scale, packed = q.shape, k.shape, q.shape[-1] ** -0.5, None
    if cu is not None:
        q_shape, kv_shape = ((len(cu[0]) - 1, *x.shape[1:]) for x in (q, k))
        packed = Packed(*(Sequences(buffer(c), int(np.diff(c).max())) for c in cu))
    out = poisoned(q.shape, np.float32) if out_dtype is np.float32 else np.empty_like(q)
    lse = poisoned(q.shape[:3])
    common = dict(sm_scale=scale, is_causal=causal, arch=arch, config=tile, lse=buffer(lse), packed=packed)
    given = (operand(q, q_shape), operand(k, kv_shape), operand(v, kv_shape))
    if q_format in ("fp16", "bf16", "fp32"):
        assert given[0].format == q_format
        launch_attn_fwd(*given, operand(out, q_shape), **common)
        return out, lse
    group, q_packed, k_packed = q.shape[1] // k.shape[1], packed and packed.q, packed and packed.k
    k_mean = token_mean(k, kv_shape, k_packed)
    q_mean = token_mean(q, q_shape, q_packed) if smooth_q else None
    bias = poisoned((1 if cu is not None else q.shape[0], q.shape[1], k.shape[2])) if smooth_q else None
    shift = poisoned(q.shape[:3])
    q_codes, *q_kept = quantise(q, q_format, None, q_shape, q_packed, mean=buffer(q_mean), lse_shift=buffer(shift),
                                k_mean=buffer(k_mean), sm_scale=scale, group=group)
    k_codes, *k_kept = quantise(k, k_format, scale_block("k", granularity), kv_shape, k_packed, mean=buffer(k_mean),
                                bias=buffer(bias), q_mean=buffer(q_mean), group=group)
    values, *v_kept = quantise_v(v, kv_shape, k_packed) if pv == "fp8" else (given[2],)
    launch_attn_fwd(q_codes, k_codes, values, operand(out, q_shape), bias=buffer(bias), lse_shift=buffer(shift), **common)
    del q_kept, k_kept, v_kept  # the arrays that the operands point at lived until here
    return out, lse


def oracle(q, k, v, q_format, k_format, pv, granularity="block", smooth_q=False, causal=False, half="fp16", block_n=128):
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    if q_format in ("fp16", "bf16", "fp32"):
        return attn_fwd(q, k, v, scale=scale, p_format=half, causal=causal, block_n=block_n)
    return lowbit_attention(q, k, v, q_format=q_format, k_format=k_format, pv_format=pv, granularity=granularity, smooth_k=True,
                            smooth_q=smooth_q, scale=scale, causal=causal, half=half, block_n=block_n)


def assert_close(got, wanted, limit=2e-3, row_limit=0.05, lse_limit=1e-2):
    """Within rounding, all rows together and each; a value on a code's edge that falls to the other side moves a score or two
    by a step, which a row of few keys feels: by 0.038 at most, and 0.006 in its LSE. A mask that is one key off moves the rows
    of `drawn_to_the_diagonal` by more than 0.3."""
    (out, lse), (ref, ref_lse) = got, wanted
    out, ref = np.asarray(out, np.float32), np.asarray(ref, np.float32)
    assert not np.isnan(out).any()
    assert np.abs(out - ref).sum() <= limit * np.abs(ref).sum()
    assert (np.abs(out - ref).sum(-1) <= row_limit * np.abs(ref).sum(-1)).all()
    seen = np.isfinite(ref_lse)
    assert (np.isneginf(lse) == ~seen).all()
    assert np.abs(lse - ref_lse)[seen].max(initial=0) <= lse_limit


# ---- quantisers

SHAPES = [(2, 3, 300, 64), (1, 2, 63, 72), (1, 1, 1, 128), (1, 1, 130, 256)]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(shape, layout):
    k, v = draw(1, *shape, layout=layout), draw(2, *shape, layout=layout)
    batch, heads, tokens, dim = shape
    partial = poisoned(shapes.partial_shape((2 * batch, heads, tokens, dim)))
    mean, scale = poisoned((batch, heads, dim)), poisoned((batch, heads, dim))
    launch_stats(buffer(partial), k=operand(k), k_mean=buffer(mean), v=operand(v), v_scale=buffer(scale))
    np.testing.assert_allclose(mean, reference.token_mean(k.astype(np.float32)), atol=1e-6)
    np.testing.assert_array_equal(scale, reference.quantize_v(v.astype(np.float32))[1])
    np.testing.assert_array_equal(token_mean(k), mean)


def test_statistics_of_more_partials_than_are_folded_at_once():
    """17000 tokens make 34 partials, of which the second pass reads 32 at once; the last ones are the largest."""
    k, v = draw(1, 1, 1, 17000, 32), draw(2, 1, 1, 17000, 32)
    k[:, :, 16384:] += 8
    v[:, :, -1] *= 50
    np.testing.assert_allclose(token_mean(k), reference.token_mean(k.astype(np.float32)), atol=1e-5)
    np.testing.assert_array_equal(quantise_v(v)[2], reference.v_scale(v.astype(np.float32)))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("with_v", [False, True], ids=["qk", "qkv"])
def test_statistics_of_all_at_once(with_v, packed):
    q_shape, kv_shape = (1, 3, 1100, 72), (1, 2, 70, 72)
    q, k, v = (draw(seed, *shape, layout="NHD") for seed, shape in ((1, q_shape), (2, kv_shape), (3, kv_shape)))
    q_cu, k_cu = np.array([0, 1030, 1030, 1100], np.int32), np.array([0, 1, 33, 70], np.int32)
    extra = {}
    if packed:
        q_shape, kv_shape = (3, *q_shape[1:]), (3, *kv_shape[1:])
        extra = dict(packed=Packed(Sequences(buffer(q_cu), 1030), Sequences(buffer(k_cu), 37)))
    elements = lambda shape, longest: int(np.prod(shapes.partial_shape(shape, longest if packed else None)))
    partial = poisoned((elements(q_shape, 1030) + (1 + with_v) * elements(kv_shape, 37),))
    q_mean, k_mean, v_scale = (poisoned((shape[0], shape[1], 72)) for shape in (q_shape, kv_shape, kv_shape))
    if with_v:
        extra.update(v=operand(v, kv_shape), v_scale=buffer(v_scale))
    launch_stats(buffer(partial), q=operand(q, q_shape), q_mean=buffer(q_mean), k=operand(k, kv_shape), k_mean=buffer(k_mean),
                 **extra)
    assert not np.isnan(partial).any()  # all of it is used, and no more
    for s in range(q_shape[0]):
        q_part, k_part = (slice(*cu[s:s + 2]) if packed else slice(None) for cu in (q_cu, k_cu))
        for x, part, mean in ((q, q_part, q_mean), (k, k_part, k_mean)):
            rows = x[0, :, part].astype(np.float32)
            np.testing.assert_allclose(mean[s], rows.sum(1) / max(rows.shape[1], 1), atol=1e-6)
        if with_v:
            np.testing.assert_array_equal(v_scale[s], reference.quantize_v(v[:1, :, k_part].astype(np.float32))[1][0])


@pytest.mark.parametrize("block", [128, None], ids=str)
@pytest.mark.parametrize("format", QK_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes(shape, format, block):
    x = draw(3, *shape, layout="NHD", dtype=ml_dtypes.bfloat16 if format == "int8" else np.float16)
    x32 = x.astype(np.float32)
    mean = reference.token_mean(x32)
    _, codes, scale = quantise(x, format, block, mean=buffer(mean))
    wanted, wanted_scale = reference.quantize_rows(x32, format, block, mean)
    np.testing.assert_allclose(scale, wanted_scale, rtol=1e-6)
    assert (codes != wanted.view(np.uint8)).mean() < 1e-3
    half_step = {"int8": 0.501, "fp8": 16.01, "int4": 1.01}.get(format)  # in units of the scale; int2 clips
    if half_step:
        rows = reference.expand_scale(scale, shape[2], block)[..., None]
        decoded = reference.decode(codes.view(wanted.dtype), format) * rows
        error = np.abs(decoded - (x32 - mean[:, :, None])) / rows
        assert error.max() <= half_step


@pytest.mark.parametrize("format", QK_FORMATS)
def test_rows_past_the_end_do_not_count_in_the_last_blocks_scale(format):
    """They would be as large as the mean that is subtracted."""
    x = (draw(3, 1, 1, 130, 64, dtype=np.float32) + 50).astype(np.float32)
    mean = reference.token_mean(x)
    *_, scale = quantise(x, format, 128, mean=buffer(mean))
    np.testing.assert_allclose(scale, reference.quantize_rows(x, format, 128, mean)[1], rtol=1e-5)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_corrections_of_smoothing(format):
    q, k, _ = draw_qkv((2, 4, 70, 64), (2, 2, 70, 64))
    k_mean, q_mean = token_mean(k), token_mean(q)
    shift, bias = poisoned((2, 4, 70)), poisoned((2, 4, 70))
    quantise(q, format, None, mean=buffer(q_mean), lse_shift=buffer(shift), k_mean=buffer(k_mean), sm_scale=0.125,
             group=2)
    quantise(k, format, None, mean=buffer(k_mean), bias=buffer(bias), q_mean=buffer(q_mean), sm_scale=0.125, group=2)
    q32, k32 = q.astype(np.float32), k.astype(np.float32)
    np.testing.assert_allclose(shift, 0.125 * np.einsum("bhnd,bhd->bhn", q32, k_mean.repeat(2, axis=1)), atol=1e-4)
    np.testing.assert_allclose(bias, reference.score_bias(q_mean, k32, k_mean), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_v_codes(shape):
    v = draw(4, *shape, layout="NHD")
    _, codes, scale = quantise_v(v)
    wanted, wanted_scale = reference.quantize_v(v.astype(np.float32))
    np.testing.assert_array_equal(scale, wanted_scale)
    assert (codes != wanted.view(np.uint8)).mean() < 1e-3
    tail = reference.decode_v(codes.view(wanted.dtype), codes.shape[-1])[:, :, shape[2]:]
    assert (tail == 0).all()


@pytest.mark.parametrize("format", QK_FORMATS)
def test_zeros_and_large_values(format):
    x = np.zeros((1, 1, 70, 64), np.float32)
    _, codes, scale = quantise(x, format, None)
    assert np.isfinite(scale).all() and (scale > 0).all()
    values = reference.decode(codes.view(reference.encode(x, np.ones((1, 1, 70), np.float32), format).dtype), format)
    assert np.abs(values * scale[..., None]).max() < 1e-29
    x[..., 0] = 1e18
    *_, scale = quantise(x, format, None)
    assert np.isfinite(scale).all()


# ---- attention


@pytest.mark.parametrize("arch", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("q_format,k_format,pv", SPECS)
def test_every_precision(q_format, k_format, pv, granularity, arch):
    q, k, v = draw_qkv((1, 2, 70, 64), (1, 1, 140, 64))
    options = dict(granularity=granularity, smooth_q=granularity == "token" and q_format != "int8")
    got = attend(q, k, v, q_format, k_format, pv, arch=arch, **options)
    assert_close(got, oracle(q, k, v, q_format, k_format, pv, **options))


@pytest.mark.parametrize("head_dim", [32, 72, 96, 128, 256])
@pytest.mark.parametrize("spec", [("int8", "int8", "fp16"), ("int4", "int4", "fp8"), ("int8", "int2", "fp16"),
                                  ("fp16", "fp16", "fp16")], ids="-".join)
def test_head_dims(head_dim, spec):
    q, k, v = draw_qkv((1, 2, 33, head_dim), (1, 1, 140, head_dim), layout="NHD")
    for arch in (TMA, POINTERS):
        assert_close(attend(q, k, v, *spec, arch=arch), oracle(q, k, v, *spec))


@pytest.mark.parametrize("lengths", [(100, 100), (1, 1), (63, 257), (150, 70), (129, 128), *EDGES_OF_TILES], ids=str)
@pytest.mark.parametrize("spec", [("int8", "int8", "fp8"), ("int4", "int4", "fp16"), ("fp16", "fp16", "fp16")], ids="-".join)
def test_causal(lengths, spec):
    q, k, v = draw_qkv((1, 2, lengths[0], 64), (1, 1, lengths[1], 64))
    k = drawn_to_the_diagonal(q, k)
    smooth_q = spec[0] == "int4"
    granularity = "token" if smooth_q else "block"
    got = attend(q, k, v, *spec, granularity=granularity, smooth_q=smooth_q, causal=True)
    wanted = oracle(q, k, v, *spec, granularity=granularity, smooth_q=smooth_q, causal=True)
    assert_close(got, wanted)
    empty = max(lengths[0] - lengths[1], 0)
    assert (got[0][:, :, :empty] == 0).all() and np.isneginf(got[1][:, :, :empty]).all()


@pytest.mark.parametrize("tile", [TileConfig(64, 64, 4, 2), TileConfig(128, 64, 4, 2), TileConfig(128, 128, 8, 2),
                                  TileConfig(64, 128, 4, 2, sum_mma=True), TileConfig(64, 32, 4, 1)], ids=str)
@pytest.mark.parametrize("pv", ["fp16", "fp8"])
def test_tiles(tile, pv):
    batch = 2 if tile.block_m == 128 else 1
    q, k, v = draw_qkv((batch, 4, 150, 64), (batch, 2, 200, 64))
    wanted = oracle(q, k, v, "int8", "int8", pv, causal=True, block_n=tile.block_n)
    assert_close(attend(q, k, v, "int8", "int8", pv, causal=True, tile=tile), wanted)


@pytest.mark.parametrize("spec", [("int8", "int8", "fp16"), ("int8", "int8", "fp8"), ("bf16", "bf16", "fp16")], ids="-".join)
def test_bfloat16_keeps_its_range(spec):
    q, k, v = draw_qkv((1, 1, 40, 64), (1, 1, 150, 64), dtype=ml_dtypes.bfloat16)
    v = (v.astype(np.float32) * 1e5).astype(ml_dtypes.bfloat16)
    got = attend(q, k, v, *spec)
    # the interpreter truncates P to bfloat16 where a GPU rounds
    assert_close(got, oracle(q, k, v, *spec, half="bf16"), limit=2e-2, lse_limit=1e-3)


@pytest.mark.parametrize("spec,granularity", [(("int8", "int8", "fp16"), "block"), (("int8", "int8", "fp8"), "token"),
                                              (("int4", "int4", "fp8"), "token"), (("fp16", "fp16", "fp16"), "block")], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(spec, granularity, causal):
    cu_q, cu_k = np.array([0, 70, 70, 199, 200], np.int32), np.array([0, 131, 140, 300, 301], np.int32)
    q, k, v = draw_qkv((1, 2, 200, 64), (1, 1, 301, 64), layout="NHD")
    v[:, :, 131:140] = np.inf  # keys of a sequence that no query belongs to: nobody may touch them
    if spec[2] == "fp8":
        v[:, :, 131:140] = 9
    smooth_q = spec[0] == "int4"
    out, lse = attend(q, k, v, *spec, granularity=granularity, smooth_q=smooth_q, causal=causal, cu=(cu_q, cu_k))
    for s in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        if rows.start < rows.stop:
            wanted = oracle(q[:, :, rows], k[:, :, keys], v[:, :, keys], *spec, granularity=granularity, smooth_q=smooth_q,
                            causal=causal)
            assert_close((out[:, :, rows], lse[:, :, rows]), wanted)


def test_all_equal_rows_and_a_huge_offset_of_k():
    q, k, v = draw_qkv((1, 1, 64, 64), (1, 1, 200, 64))
    k[:] = k[:, :, :1]
    out, _ = attend(q, k, v, "int8", "int8", "fp16")
    np.testing.assert_allclose(out, np.broadcast_to(v.astype(np.float32).mean(axis=2, keepdims=True), out.shape), atol=2e-3)
    q, k, v = draw_qkv((1, 1, 64, 64), (1, 1, 200, 64))
    wanted = attend(q, k, v, "int8", "int8", "fp16")[0]
    got = attend(q, (k.astype(np.float32) + 1000).astype(np.float32), v, "int8", "int8", "fp16")[0]
    assert np.abs(got - wanted).sum() < 0.02 * np.abs(wanted).sum()


def test_zero_inputs():
    q, k, v = (np.zeros((1, 1, 70, 64), np.float16) for _ in range(3))
    for pv in ("fp16", "fp8"):
        out, lse = attend(q, k, v, "int8", "int8", pv)
        assert (out == 0).all() and np.allclose(lse, np.log(70), atol=1e-5)


def test_output_in_half_precision_and_any_layout():
    q, k, v = draw_qkv((2, 2, 50, 64), (2, 2, 90, 64), layout="NHD")
    wanted = oracle(q, k, v, "int8", "int8", "fp16")[0]
    out, _ = attend(q, k, v, "int8", "int8", "fp16", out_dtype=np.float16)
    assert out.strides == q.strides
    assert np.abs(out - wanted).sum() < 1e-3 * np.abs(wanted).sum()
