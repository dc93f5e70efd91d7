"""Formats, packing and the NumPy quantisers."""
import ml_dtypes
import numpy as np
import pytest

from lowbit_video.kernels.attention.reference import round_significand
from lowbit_video.kernels.formats import FORMATS, PERMUTATION_16, get_format, scale_block
from lowbit_video.kernels.quant import reference as quant

from helpers import qkv


def rows(n=200, d=64, seed=0):
    return np.random.default_rng(seed).standard_normal((2, 3, n, d), dtype=np.float32)


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_unpack_to_odd_values(bits):
    half = 1 << (bits - 1)
    codes = np.arange(-half, half, dtype=np.int8).repeat(8).reshape(1, -1)
    packed = quant.pack(codes, bits)
    assert packed.shape == (1, codes.shape[1] * bits // 8)
    np.testing.assert_array_equal(quant.decode(packed, f"int{bits}"), 2.0 * codes + 1)


def test_first_element_is_in_the_lowest_bits():
    assert quant.pack(np.array([[1, -2]], np.int8), 4)[0, 0] == 0x01 | (0xE << 4)
    assert quant.pack(np.array([[1, 0, -1, -2]], np.int8), 2)[0, 0] == 0b10_11_00_01


# What an ideal scalar quantiser of that width leaves on normal data bounds these from below.
@pytest.mark.parametrize("name, granularity, bound", [
    ("int8", 64, 0.010), ("int8", None, 0.0065), ("int4", None, 0.10), ("int2", None, 0.35), ("fp8", 128, 0.027)])
@pytest.mark.parametrize("n", [1, 63, 226])
def test_error_of_a_round_trip(name, granularity, bound, n):
    x = rows(n)
    codes, scale = quant.quantize_rows(x, name, granularity)
    values = quant.decode(codes, name) * quant.expand_scale(scale, n, granularity)[..., None]
    assert scale.shape == (2, 3, -(-n // (granularity or 1)))
    assert np.sqrt(np.mean((values - x) ** 2)) < bound


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_the_largest_value_is_kept(name):
    x = rows(5)
    codes, scale = quant.quantize_rows(x, name, None)
    values = quant.decode(codes, name) * scale[..., None]
    at = np.abs(x).argmax(-1)[..., None]
    largest, kept = np.take_along_axis(x, at, -1), np.take_along_axis(values, at, -1)
    np.testing.assert_allclose(kept, largest, rtol=1 / 15 + 1e-6 if name == "int4" else 1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8"])
def test_zeros_have_a_finite_scale_and_stay_tiny(name):
    codes, scale = quant.quantize_rows(np.zeros((1, 1, 3, 32), np.float32), name, 64)
    assert np.isfinite(scale).all() and (scale > 0).all()
    assert np.abs(quant.decode(codes, name) * scale[..., None]).max() < 1e-29


def test_a_short_last_block_does_not_dilute_int2s_rms():
    x = np.ones((1, 1, 65, 32), np.float32)
    _, scale = quant.quantize_rows(x, "int2", 64)
    np.testing.assert_allclose(scale[0, 0], 0.498, rtol=1e-6)


def test_mean_is_subtracted_before_scaling():
    x = rows() + 100.0
    mean = quant.token_mean(x)
    codes, scale = quant.quantize_rows(x, "int8", 64, mean)
    values = quant.decode(codes, "int8") * quant.expand_scale(scale, 200, 64)[..., None] + mean[:, :, None]
    assert np.abs(values - x).max() < 0.03


def test_v_is_transposed_permuted_and_zero_filled():
    v = rows(n=130)
    codes, scale = quant.quantize_v(v)
    assert codes.shape == (2, 3, 64, 256) and scale.shape == (2, 3, 64)
    assert not codes[..., 144:].astype(np.float32).any()
    for position, key in enumerate(PERMUTATION_16):
        expected = (v[0, 0, 16 + key] / scale[0, 0]).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(codes[0, 0, :, 16 + position].astype(np.float32), expected)
    np.testing.assert_allclose(quant.decode_v(codes, 130) * scale[:, :, None], v, rtol=2**-4, atol=1e-2)


def test_permutation_follows_its_formula():
    assert [PERMUTATION_16[4 * t + 2 * h + e] for t in range(4) for h in range(2) for e in range(2)] == \
        [8 * h + 2 * t + e for t in range(4) for h in range(2) for e in range(2)]


def test_score_bias_is_q_mean_times_smoothed_k():
    q, k, _ = (a.transpose(0, 2, 1, 3) for a in qkv(heads=4, kv_heads=2))
    q_mean, k_mean = quant.token_mean(q), quant.token_mean(k)
    bias = quant.score_bias(q_mean, k, k_mean)
    np.testing.assert_allclose(bias[0, 3], (k[0, 1] - k_mean[0, 1]) @ q_mean[0, 3], atol=1e-5)


@pytest.mark.parametrize("bits, exponent, dtype, top", [
    (11, -14, np.float16, 60000.0), (8, -126, ml_dtypes.bfloat16, 1e30), (4, -6, ml_dtypes.float8_e4m3fn, 440.0)])
def test_rounding_of_p_is_the_formats_own(bits, exponent, dtype, top):
    rng = np.random.default_rng(0)
    x = np.concatenate([np.abs(rng.standard_normal(20000)) * s for s in (top / 8, 1.0, 1e-2, 1e-4, 1e-5)]).astype(np.float32)
    x = np.minimum(x, top)
    np.testing.assert_array_equal(round_significand(x.copy(), bits, exponent), x.astype(dtype).astype(np.float32))


def test_only_blocks_of_k_share_a_scale():
    assert scale_block("k", "block") == 128
    assert [scale_block(*which) for which in (("q", "block"), ("q", "token"), ("k", "token"))] == [None] * 3


def test_unknown_format_lists_what_exists():
    with pytest.raises(ValueError, match="int3.*int8, int4, int2, fp8"):
        get_format("int3")
    assert set(FORMATS) == {"int8", "int4", "int2", "fp8", "fp16", "bf16", "fp32"}
