"""The two halves of attention: on a CPU, attention of codes is attention, to the bit."""
import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video import Precision, UnsupportedError

from helpers import qkv

PRECISIONS = {str(p) if isinstance(p, str) else f"{p.spec} {p.granularity} k{p.smooth_k:d} q{p.smooth_q:d}": p for p in (
    "int8+fp8", "int8+fp16", "int4+fp16", "int8/int4+fp8", "int2+fp8", "fp8+fp8", Precision("int8+fp8", smooth_k=False),
    Precision("int4+fp8", smooth_k=False, smooth_q=False), Precision("int8+fp16", granularity="token", smooth_q=True),
    Precision("int8/int4+fp16", granularity="block"))}
LENGTHS = [(1, 1), (63, 127), (127, 63), (128, 128), (129, 257), (257, 129)]


def same(framework, got, wanted):
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_array_equal(framework.numpy(one), framework.numpy(other))


def tensors(framework, dtype="float32", layout="NHD", **sizes):
    arrays = qkv(**{**dict(batch=2, heads=3, dim=32), **sizes})
    return [framework.tensor(x if layout == "NHD" else x.transpose(0, 2, 1, 3), dtype) for x in arrays]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_attention_of_codes_is_attention(framework, precision, causal):
    for q_len, kv_len in LENGTHS:
        q, k, v = tensors(framework, q_len=q_len, kv_len=kv_len)
        wanted = lv.attention(q, k, v, precision, is_causal=causal, return_lse=True)
        codes = lv.prequantize(q, k, v, precision, return_lse=True)
        same(framework, lv.attention_of_codes(codes, is_causal=causal, return_lse=True), wanted)
        codes = lv.prequantize(q, k, v, precision)
        same(framework, lv.attention_of_codes(codes, is_causal=causal), wanted[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("spec", ["int8+fp8", "int4+fp16"])
def test_dtypes_and_layouts(framework, spec, dtype):
    for layout in ("NHD", "HND"):
        q, k, v = tensors(framework, dtype, layout, q_len=70, kv_len=130, dim=48)
        wanted = lv.attention(q, k, v, spec, layout, return_lse=True, scale=0.3)
        codes = lv.prequantize(q, k, v, spec, layout, return_lse=True, scale=0.3)
        same(framework, lv.attention_of_codes(codes, layout, return_lse=True), wanted)
    out = lv.attention_of_codes(codes)  # the output's layout is chosen then
    same(framework, framework.tensor(framework.numpy(out).transpose(0, 2, 1, 3), dtype), wanted[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_beyond_float16_keep_their_range(framework, dtype):
    q, k, v = tensors(framework, dtype, q_len=40)
    v = v * 1e5
    wanted = lv.attention(q, k, v, "int8+fp16")
    same(framework, lv.attention_of_codes(lv.prequantize(q, k, v, "int8+fp16")), wanted)
    assert np.isfinite(framework.numpy(wanted)).all() and np.abs(framework.numpy(wanted)).max() > 65504


def test_tiny_values_keep_their_digits(framework):
    q, k, v = tensors(framework, q_len=40)
    wanted = lv.attention(q, k, v * 1e-8, "int8+fp16")
    same(framework, lv.attention_of_codes(lv.prequantize(q, k, v * 1e-8, "int8+fp16")), wanted)
    usual = framework.numpy(lv.attention(q, k, v, "int8+fp16"))
    np.testing.assert_allclose(framework.numpy(wanted) * 1e8, usual, atol=1e-3)


@pytest.mark.parametrize("spec", ["int8+fp8", "int4+fp16"])
def test_the_originals_are_not_changed_and_may_be(framework, spec):
    given = tensors(framework, q_len=130)
    before = [framework.numpy(x).copy() for x in given]
    wanted = lv.attention(*given, spec, return_lse=True)
    codes = lv.prequantize(*given, spec, return_lse=True)
    for x, array in zip(given, before):
        np.testing.assert_array_equal(framework.numpy(x), array)
        x[:] = framework.tensor(np.full(array.shape, 7.0))
    same(framework, lv.attention_of_codes(codes, return_lse=True), wanted)
    same(framework, lv.attention_of_codes(codes, return_lse=True), wanted)  # and codes serve again


def test_bytes_by_hand(framework):
    q, k, v = tensors(framework, batch=1, heads=2, q_len=130)
    padded = lambda count: -(-count // 128) * 128
    codes, rows = padded(2 * 130 * 32), padded(2 * 130 * 4)
    assert (codes, rows) == (8320, 1152)
    values = 2 * 32 * 256  # whole blocks of 128
    assert lv.prequantize(q, k, v, "int8+fp8").nbytes == codes + rows + codes + padded(2 * 2 * 4) + values == 34304
    assert lv.prequantize(q, k, v, "int8+fp8", return_lse=True).nbytes == 34304 + rows
    half = padded(2 * 130 * 16)
    assert lv.prequantize(q, k, v, "int4+fp16").nbytes == 2 * (half + rows) + padded(2 * 130 * 32 * 4) + rows  # float32 V, bias
    big = [framework.tensor(framework.numpy(x).repeat(8, 1), "float16") for x in tensors(framework, q_len=128, dim=128)]
    assert lv.prequantize(*big, "int8+fp8").nbytes / (3 * 2 * 2 * 3 * 1024 * 128) == pytest.approx(0.5, abs=0.007)


def test_a_lse_must_be_asked_for_in_time(framework):
    q, k, v = tensors(framework, q_len=20)
    with pytest.raises(ValueError, match="made without return_lse=True"):
        lv.attention_of_codes(lv.prequantize(q, k, v), return_lse=True)
    unsmoothed = Precision("int8+fp16", smooth_k=False)  # needs nothing of K's mean
    same(framework, lv.attention_of_codes(lv.prequantize(q, k, v, unsmoothed), return_lse=True),
         lv.attention(q, k, v, unsmoothed, return_lse=True))


@pytest.mark.parametrize("sizes, choices, error, words", [
    ({}, dict(precision="exact"), UnsupportedError, "exact attention has no codes; use attention"),
    ({}, dict(precision="fp16"), UnsupportedError, "exact attention has no codes"),
    (dict(kv_heads=1), {}, UnsupportedError, "grouped queries; use attention"),
    (dict(dim=40), {}, UnsupportedError, "head dim 40 is not a multiple of 16"),
    ({}, dict(precision="int9"), ValueError, "unknown precision 'int9'"),
    ({}, dict(tensor_layout="NDH"), ValueError, "unknown tensor_layout 'NDH'")], ids=str)
def test_what_cannot_be_codes_is_refused(framework, sizes, choices, error, words):
    with pytest.raises(error, match=words):
        lv.prequantize(*tensors(framework, q_len=20, **sizes), **choices)


def test_what_cannot_be_attended_is_refused(framework):
    q, k, v = tensors(framework, q_len=20)
    codes = lv.prequantize(q, k, v)
    with pytest.raises(ValueError, match="unknown tensor_layout 'BHN'"):
        lv.attention_of_codes(codes, "BHN")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        lv.attention_of_codes(codes, backend="cuda")
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
        lv.attention_of_codes(codes, backend="hopper")
    with pytest.raises(ValueError, match="one shape"):
        lv.prequantize(q, k, v[:, :10])
    with pytest.raises(lv.NonFiniteError, match="^k has 1 NaN"):
        lv.prequantize(q, framework.tensor(np.where(np.arange(framework.numpy(k).size) == 3, np.nan, 0).reshape(k.shape)), v)


@pytest.mark.parametrize("value", [None, 3, "codes", lv.AttentionCodes])
def test_what_are_no_codes_is_refused(value):
    with pytest.raises(TypeError, match="^codes is .*; give what prequantize.. returned"):
        lv.attention_of_codes(value)
