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
from lowbit_video.kernels.formats import QK_FORMATS, scale_block  # noqa: E402
from lowbit_video.kernels.quant import reference, shapes  # noqa: E402
from lowbit_video.kernels.quant.quant_qk import launch_quant_qk  # noqa: E402
from lowbit_video.kernels.quant.quant_v import launch_quant_v  # noqa: E402
from lowbit_video.kernels.quant.token_stats import launch_stats  # noqa: E402
from lowbit_video.kernels.tuning import TileConfig  # noqa: E402

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


def quantise(x, format, block, shape=None, **options):
    shape = shape or x.shape
    varlen = options.get("cu_seqlens") is not None
    codes = poisoned(shapes.code_shape(shape, format, varlen), np.uint8)
    scale = poisoned(shapes.scale_shape(shape, block, varlen))
    launch_quant_qk(buffer(x), strides(x), buffer(codes), buffer(scale), shape=shape, format=format, block=block,
                    **options)
    return codes, scale


def one_statistic(x, shape, varlen, operand, result):
    partial, found = poisoned(shapes.partial_shape(shape, varlen.get("max_len"))), poisoned((*shape[:2], shape[3]))
    launch_stats(buffer(partial), **{operand: buffer(x), f"{operand}_strides": strides(x), result: buffer(found)},
                 kv_shape=shape, cu_seqlens_k=varlen.get("cu_seqlens"), max_k=varlen.get("max_len"))
    return found


def token_mean(x, shape=None, **varlen):
    return one_statistic(x, shape or x.shape, varlen, "k", "k_mean")


def quantise_v(v, shape=None, **varlen):
    shape = shape or v.shape
    scale = one_statistic(v, shape, varlen, "v", "v_scale")
    codes = poisoned(shapes.v_code_shape(shape, bool(varlen)), np.uint8)
    launch_quant_v(buffer(v), strides(v), buffer(codes), buffer(scale), shape=shape, **varlen)
    return codes, scale


def attend(q, k, v, q_format, k_format, pv, granularity="block", smooth_q=False, causal=False, arch=TMA, tile=TILE,
           out_dtype=np.float32, cu=None):
    """(out, lse) by the launchers, from quantising to the end. cu: (cu_q, cu_k) for packed [1, H, T, D] arrays."""
    q_shape, kv_shape, scale = q.shape, k.shape, q.shape[-1] ** -0.5
    q_varlen, k_varlen, extra = {}, {}, {}
    if cu is not None:
        q_shape, kv_shape = ((len(cu[0]) - 1, *x.shape[1:]) for x in (q, k))
        q_varlen, k_varlen = (dict(cu_seqlens=buffer(c), max_len=int(np.diff(c).max())) for c in cu)
        extra = dict(cu_seqlens_q=buffer(cu[0]), cu_seqlens_k=buffer(cu[1]), max_q=q_varlen["max_len"],
                     max_k=k_varlen["max_len"])
    out = poisoned(q.shape, np.float32) if out_dtype is np.float32 else np.empty_like(q)
    lse = poisoned(q.shape[:3])
    common = dict(q_shape=q_shape, kv_shape=kv_shape, out_strides=strides(out), v_strides=strides(v), sm_scale=scale,
                  is_causal=causal, arch=arch, config=tile, lse=buffer(lse), **extra)
    if q_format in ("fp16", "bf16", "fp32"):
        launch_attn_fwd(buffer(q), buffer(k), buffer(v), buffer(out), q_format=q_format, k_format=k_format, pv_format=pv,
                        q_strides=strides(q), k_strides=strides(k), **common)
        return out, lse
    group = q.shape[1] // k.shape[1]
    k_mean = token_mean(k, kv_shape, **k_varlen)
    q_mean = token_mean(q, q_shape, **q_varlen) if smooth_q else None
    bias = poisoned((1 if cu is not None else q.shape[0], q.shape[1], k.shape[2])) if smooth_q else None
    shift = poisoned(q.shape[:3])
    q_codes, q_scale = quantise(q, q_format, None, q_shape, mean=buffer(q_mean), lse_shift=buffer(shift),
                                k_mean=buffer(k_mean), sm_scale=scale, group=group, **q_varlen)
    k_codes, k_scale = quantise(k, k_format, scale_block("k", granularity), kv_shape, mean=buffer(k_mean), bias=buffer(bias),
                                q_mean=buffer(q_mean), group=group, **k_varlen)
    values, v_scale = quantise_v(v, kv_shape, **k_varlen) if pv == "fp8" else (v, None)
    launch_attn_fwd(buffer(q_codes), buffer(k_codes), buffer(values), buffer(out), q_format=q_format, k_format=k_format,
                    pv_format=pv, granularity=granularity, q_scale=buffer(q_scale), k_scale=buffer(k_scale),
                    v_scale=buffer(v_scale), bias=buffer(bias), lse_shift=buffer(shift), **common)
    return out, lse


def oracle(q, k, v, q_format, k_format, pv, granularity="block", smooth_q=False, causal=False, half="fp16", block_n=128):
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    if q_format in ("fp16", "bf16", "fp32"):
        return attn_fwd(q, k, v, scale=scale, p_format=half, causal=causal, block_n=block_n)
    return lowbit_attention(q, k, v, q_format=q_format, k_format=k_format, pv_format=pv, granularity=granularity, smooth_k=True,
                            smooth_q=smooth_q, scale=scale, causal=causal, half=half, block_n=block_n)


def assert_close(got, wanted, limit=2e-3, lse_limit=5e-3):
    """Within rounding; a value on a code's edge that falls to the other side moves a score or two by a step."""
    (out, lse), (ref, ref_lse) = got, wanted
    assert not np.isnan(np.asarray(out, np.float32)).any()
    assert np.abs(out - ref).sum() <= limit * np.abs(ref).sum()
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
    launch_stats(buffer(partial), k=buffer(k), k_strides=strides(k), k_mean=buffer(mean), v=buffer(v), v_strides=strides(v),
                 v_scale=buffer(scale), kv_shape=shape)
    np.testing.assert_allclose(mean, reference.token_mean(k.astype(np.float32)), atol=1e-6)
    np.testing.assert_array_equal(scale, reference.quantize_v(v.astype(np.float32))[1])
    np.testing.assert_array_equal(token_mean(k), mean)


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("with_v", [False, True], ids=["qk", "qkv"])
def test_statistics_of_all_at_once(with_v, packed):
    q_shape, kv_shape = (1, 6, 1100, 72), (1, 2, 70, 72)
    q, k, v = (draw(seed, *shape, layout="NHD") for seed, shape in ((1, q_shape), (2, kv_shape), (3, kv_shape)))
    q_cu, k_cu = np.array([0, 1030, 1030, 1100], np.int32), np.array([0, 1, 33, 70], np.int32)
    extra = {}
    if packed:
        q_shape, kv_shape = (3, *q_shape[1:]), (3, *kv_shape[1:])
        extra = dict(cu_seqlens_q=buffer(q_cu), cu_seqlens_k=buffer(k_cu), max_q=1030, max_k=37)
    elements = lambda shape, longest: int(np.prod(shapes.partial_shape(shape, longest if packed else None)))
    partial = poisoned((elements(q_shape, 1030) + (1 + with_v) * elements(kv_shape, 37),))
    q_mean, k_mean, v_scale = (poisoned((shape[0], shape[1], 72)) for shape in (q_shape, kv_shape, kv_shape))
    if with_v:
        extra.update(v=buffer(v), v_strides=strides(v), v_scale=buffer(v_scale))
    launch_stats(buffer(partial), q=buffer(q), q_strides=strides(q), q_mean=buffer(q_mean), q_shape=q_shape, k=buffer(k),
                 k_strides=strides(k), k_mean=buffer(k_mean), kv_shape=kv_shape, **extra)
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
    codes, scale = quantise(x, format, block, mean=buffer(mean))
    wanted, wanted_scale = reference.quantize_rows(x32, format, block, mean)
    np.testing.assert_allclose(scale, wanted_scale, rtol=1e-6)
    assert (codes != wanted.view(np.uint8)).mean() < 1e-3
    half_step = {"int8": 0.501, "fp8": 16.01, "int4": 1.01}.get(format)  # in units of the scale; int2 clips
    if half_step:
        rows = reference.expand_scale(scale, shape[2], block)[..., None]
        decoded = reference.decode(codes.view(wanted.dtype), format) * rows
        error = np.abs(decoded - (x32 - mean[:, :, None])) / rows
        assert error.max() <= half_step


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_corrections_of_smoothing(format):
    q, k, _ = draw_qkv((2, 4, 70, 64), (2, 2, 70, 64))
    k_mean, q_mean = token_mean(k), token_mean(q)
    shift, bias = poisoned((2, 4, 70)), poisoned((2, 4, 70))
    quantise(q, format, None, mean=buffer(q_mean), lse_shift=buffer(shift), k_mean=buffer(k_mean), sm_scale=0.125,
             group=2)
    quantise(k, format, None, mean=buffer(k_mean), bias=buffer(bias), q_mean=buffer(q_mean), group=2)
    q32, k32 = q.astype(np.float32), k.astype(np.float32)
    np.testing.assert_allclose(shift, 0.125 * np.einsum("bhnd,bhd->bhn", q32, k_mean.repeat(2, axis=1)), atol=1e-4)
    np.testing.assert_allclose(bias, reference.score_bias(q_mean, k32, k_mean), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_v_codes(shape):
    v = draw(4, *shape, layout="NHD")
    codes, scale = quantise_v(v)
    wanted, wanted_scale = reference.quantize_v(v.astype(np.float32))
    np.testing.assert_array_equal(scale, wanted_scale)
    assert (codes != wanted.view(np.uint8)).mean() < 1e-3
    tail = reference.decode_v(codes.view(wanted.dtype), codes.shape[-1])[:, :, shape[2]:]
    assert (tail == 0).all()


@pytest.mark.parametrize("format", QK_FORMATS)
def test_zeros_and_large_values(format):
    x = np.zeros((1, 1, 70, 64), np.float32)
    codes, scale = quantise(x, format, None)
    assert np.isfinite(scale).all() and (scale > 0).all()
    values = reference.decode(codes.view(reference.encode(x, np.ones((1, 1, 70), np.float32), format).dtype), format)
    assert np.abs(values * scale[..., None]).max() < 1e-29
    x[..., 0] = 1e18
    _, scale = quantise(x, format, None)
    assert np.isfinite(scale).all()


# ---- attention


@pytest.mark.parametrize("arch", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("granularity", ["block", "token"])
@pytest.mark.parametrize("q_format,k_format,pv", SPECS)
def test_every_precision(q_format, k_format, pv, granularity, arch):
    q, k, v = draw_qkv((1, 2, 70, 64), (1, 1, 300, 64))
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


@pytest.mark.parametrize("lengths", [(100, 100), (1, 1), (63, 257), (150, 70), (129, 128)], ids=str)
@pytest.mark.parametrize("spec", [("int8", "int8", "fp8"), ("int4", "int4", "fp16"), ("fp16", "fp16", "fp16")], ids="-".join)
def test_causal(lengths, spec):
    q, k, v = draw_qkv((1, 2, lengths[0], 64), (1, 1, lengths[1], 64))
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
    q, k, v = draw_qkv((2, 4, 150, 64), (2, 2, 200, 64))
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
