"""The NumPy attention: every feature against float64 softmax, and the quality floors of every precision."""
import numpy as np
import pytest

from lowbit_video.kernels.attention import reference
from lowbit_video.precision import Precision, precision_specs

from helpers import EDGES_OF_TILES, naive_attention, qkv, sqnr_db

LOW_BIT = [spec for spec in precision_specs() if "+" in spec]


def hnd(*arrays):
    return [a.transpose(0, 2, 1, 3) for a in arrays]


def run(q, k, v, spec, **options):
    p = Precision(spec, **{key: options.pop(key) for key in ("granularity", "smooth_k", "smooth_q") if key in options})
    scale = options.pop("scale", q.shape[-1] ** -0.5)
    out, lse = reference.lowbit_attention(
        *hnd(q, k, v), q_format=p.q, k_format=p.k, pv_format=p.pv, granularity=p.granularity, smooth_k=p.smooth_k,
        smooth_q=p.smooth_q, scale=scale, **options)
    return out.transpose(0, 2, 1, 3), lse


def exact(q, k, v, **options):
    out, lse = reference.attn_fwd(*hnd(q, k, v), scale=options.pop("scale", q.shape[-1] ** -0.5), **options)
    return out.transpose(0, 2, 1, 3), lse


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (63, 63), (226, 226), (700, 130), (5, 300), (300, 5), *EDGES_OF_TILES])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_equals_softmax(q_len, kv_len, causal):
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, dim=32)
    out, lse = exact(q, k, v, causal=causal, scale=0.3)
    expected, expected_lse = naive_attention(q, k, v, scale=0.3, causal=causal)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def test_a_row_without_keys_gives_zero_and_minus_infinity():
    q, k, v = qkv(q_len=8, kv_len=3)
    out, lse = exact(q, k, v, causal=True)
    assert not out[:, :5].any() and np.isneginf(lse[:, :, :5]).all()
    assert np.isfinite(lse[:, :, 5:]).all() and out[:, 5:].any()


@pytest.mark.parametrize("spec, floor_db", [("int8+fp16", 34.0), ("int8+fp8", 26.0)])
def test_heads_and_batches_have_scales_of_their_own(spec, floor_db):
    """Each of another size: what is scaled by a neighbour's is wrong by a factor."""
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=140)
    sizes = np.exp(np.arange(2 * 2, dtype=np.float32)).reshape(2, 1, 2, 1)
    q, k, v = q / sizes.repeat(2, axis=2), k * sizes, v * sizes[::-1, :, ::-1]
    out, _ = run(q, k, v, spec)
    expected, _ = naive_attention(q, k, v)
    for batch in range(2):
        for head in range(4):
            assert sqnr_db(out[batch, :, head], expected[batch, :, head]) > floor_db


def test_tile_size_does_not_matter():
    q, k, v = qkv(q_len=300)
    a, b = (exact(q, k, v, block_n=n)[0] for n in (128, 7))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_tile_order_moves_only_the_grid_of_fp8(causal):
    q, k, v = qkv(q_len=300)
    forth, back = (exact(q, k, v, block_n=64, causal=causal, backwards=b) for b in (False, True))
    np.testing.assert_allclose(back[0], forth[0], atol=1e-6)
    np.testing.assert_allclose(back[1], forth[1], atol=1e-5)
    forth, back = (run(q, k, v, "int8+fp8", block_n=64, causal=causal, backwards=b)[0] for b in (False, True))
    expected = exact(q, k, v, causal=causal)[0]
    assert sqnr_db(back, forth) < 40.0 and abs(sqnr_db(back, expected) - sqnr_db(forth, expected)) < 0.5


# dB on standard normal input with a shifted K channel, head dim 64, 1000 tokens. int8 leaves 37.7, FP8's three
# significant bits of V and P 28.3; int4 on both sides leaves 17.0, close to what 4 bits can do at all: a
# quantiser at the rate-distortion bound of normal data (24.1 dB each) would leave 21.1.
FLOORS_DB = {"int8+fp16": 35.0, "int8+fp8": 26.0, "fp8+fp16": 26.5, "fp8+fp8": 24.0, "int4+fp16": 16.5, "int4+fp8": 16.0,
             "int8/int4+fp16": 19.4, "int8/int4+fp8": 18.8, "int2+fp16": 6.3, "int2+fp8": 6.3,
             "int8/int2+fp16": 8.6, "int8/int2+fp8": 8.6}


def test_line_takes_the_place_of_exponentials_in_the_registers_it_names():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(-6, 8, 1000)).astype(np.float32)
    straight = reference.line_probabilities(x)
    assert np.abs(straight / np.exp2(x) - 1).max() < 0.09 and (np.diff(straight) >= 0).all()
    assert (reference.line_probabilities(np.float32([8, -60, -np.inf])) == [256, 0, 0]).all()
    q, k = rng.standard_normal((1, 1, 16, 128), np.float32), rng.standard_normal((1, 1, 128, 128), np.float32)
    v = np.eye(128, dtype=np.float32)[None, None]  # the output is P over its row's sum
    both = [reference.attn_fwd(q, k, v, scale=0.2, p_format="fp8", sum_rounded=True, line=line)[0][0, 0] for line in (0, 3)]
    grid, line = (p / p.max(1, keepdims=True) for p in both)  # the maximum is 256 by either
    differs = ~np.isclose(line, grid, rtol=1e-3)  # codes are a 16th apart
    keys = np.arange(128) % 64
    assert differs[:8, keys < 32].mean() > 0.1 and differs[8:, keys < 16].mean() > 0.1
    assert not differs[:8, keys >= 32].any() and not differs[8:, keys >= 16].any()


@pytest.mark.parametrize("spec", LOW_BIT)
def test_quality_floor(spec):
    q, k, v = qkv(q_len=1000, k_offset=6.0)
    out, lse = run(q, k, v, spec)
    expected, expected_lse = naive_attention(q, k, v)
    assert sqnr_db(out, expected) >= FLOORS_DB[spec]
    assert np.abs(lse - expected_lse).max() < (0.5 if "int2" in spec else 0.1)


def test_smoothing_pays():
    q, k, v = qkv(q_len=500, k_offset=30.0)
    q[..., 7] += 20.0
    expected, _ = naive_attention(q, k, v)
    quality = {(sk, sq): sqnr_db(run(q, k, v, "int4+fp16", smooth_k=sk, smooth_q=sq)[0], expected)
               for sk in (False, True) for sq in (False, True)}
    assert quality[True, True] > quality[True, False] + 3 and quality[True, True] > quality[False, True] + 3


@pytest.mark.parametrize("spec", ["int8+fp16", "int4+fp8", "int8/int2+fp16"])
@pytest.mark.parametrize("options", [dict(causal=True), dict(scale=0.02), dict(granularity="token"), dict(granularity="block")],
                         ids=lambda o: "-".join(map(str, next(iter(o.items())))))
def test_features_at_low_bit(spec, options):
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=130, kv_len=190)
    out, lse = run(q, k, v, spec, **options)
    expected, expected_lse = naive_attention(q, k, v, scale=options.get("scale"), causal=options.get("causal", False))
    assert sqnr_db(out, expected) > (7.0 if "int2" in spec else 12.0 if "int4" in spec else 34.0)
    assert np.abs(lse - expected_lse).max() < 0.6


@pytest.mark.parametrize("dim", [32, 40, 72, 96, 128, 160, 256])
def test_head_dims(dim):
    q, k, v = qkv(q_len=70, dim=dim)
    assert sqnr_db(run(q, k, v, "int8+fp16")[0], naive_attention(q, k, v)[0]) > 34.0


def test_bfloat16_range_survives():
    q, k, v = qkv(q_len=100)
    v *= 1e5
    out, _ = run(q, k, v, "int8+fp16", half="bf16")
    assert sqnr_db(out, naive_attention(q, k, v)[0]) > 34.0


def test_fp8_survives_a_mean_in_v():
    q, k, v = qkv(q_len=600)
    v += 1.0
    out, _ = run(q, k, v, "int8+fp8")
    expected = naive_attention(q, k, v)[0]
    assert np.abs(out - expected).mean() / np.abs(expected).mean() < 0.01


@pytest.mark.parametrize("spec", LOW_BIT)
@pytest.mark.parametrize("fill", [0.0, 1.0], ids=["zeros", "all-equal"])
def test_degenerate_inputs_stay_finite(spec, fill):
    q = k = v = np.full((1, 90, 1, 64), fill, np.float32)
    out, lse = run(q, k, v, spec)
    np.testing.assert_allclose(out, fill, atol=1e-6)
    assert np.isfinite(lse).all()
