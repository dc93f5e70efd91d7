"""Rotation in NumPy: scores stay what they are, outlier channels spoil no other, and nothing is lost where there are none."""
import numpy as np
import pytest

from lowbit_video.kernels.attention import reference
from lowbit_video.kernels.quant import reference as quant
from lowbit_video.precision import Precision

OUTLIERS = {"none": ((), (), 1), "one of K": ((), (5,), 10), "four of K": ((), (5, 20, 33, 60), 10),
            "of Q and of K": ((9,), (5,), 10), "of both, far out": ((9,), (5,), 30), "of both, the same": ((5,), (5,), 10)}
"""Channels of Q and of K that are so many times as large."""


def drawn(case, dim=64, tokens=500):
    """q, k and v [1, 2, N, D]; scores spread by 1.5, so that softmax neither picks one key nor averages all."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, tokens, dim), np.float32) for _ in range(3))
    *both, times = OUTLIERS[case]
    for x, channels in zip((q, k), both):
        x[..., list(channels)] *= times
    q *= 1.5 * dim**0.5 / (q @ k.transpose(0, 1, 3, 2)).std()
    return q, k, v


def error(q, k, v, spec, **options):
    """Relative L1 of the output."""
    p = Precision(spec)
    exact, _ = reference.attn_fwd(q, k, v, scale=q.shape[-1] ** -0.5)
    out, _ = reference.lowbit_attention(
        q, k, v, q_format=p.q, k_format=p.k, pv_format=p.pv, granularity=p.granularity, smooth_k=p.smooth_k,
        smooth_q=p.smooth_q, rotate=p.rotate, scale=q.shape[-1] ** -0.5, **options)
    return np.abs(out - exact).mean() / np.abs(exact).mean()


@pytest.mark.parametrize("dim", [64, 128])
def test_scores_are_the_same_and_channels_as_large_in_q_as_in_k(dim):
    rng = np.random.default_rng(1)
    size = np.exp(2 * rng.standard_normal((2, 1, dim)))
    q, k = (rng.standard_normal((2, heads, 30, dim)) * size[i] for i, heads in enumerate((6, 2)))
    factors = quant.rotation(quant.channel_top(q, None), quant.channel_top(k, None))
    group = lambda x: np.repeat(x, 3, axis=1)
    scores = quant.rotate(q, factors[0]) @ group(quant.rotate(k, factors[1])).transpose(0, 1, 3, 2)
    np.testing.assert_allclose(scores, q @ group(k).transpose(0, 1, 3, 2), rtol=1e-10, atol=1e-10 * np.abs(scores).max())
    tops = [np.abs(x * f[:, :, None]).max(2) for x, f in zip((q, k), factors)]
    np.testing.assert_allclose(tops[0].reshape(2, 2, 3, dim).max(2), tops[1], rtol=1e-12)


def test_the_matrix_is_hadamards():
    assert quant.hadamard(4).tolist() == (np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2).tolist()
    for dim in (64, 128):
        np.testing.assert_allclose(quant.hadamard(dim) @ quant.hadamard(dim), np.eye(dim), atol=1e-14)


def test_what_is_largest_is_taken_without_the_mean():
    x = np.array([3.0, 5.0, 10.0, 6.0]).reshape(1, 1, 4, 1)
    assert quant.channel_top(x, None)[0, 0, 0] == 10 and quant.channel_top(x, np.array([[[6.0]]]))[0, 0, 0] == 4
    assert quant.channel_top(x, np.array([[[9.0]]]))[0, 0, 0] == 6


LIMITS = {"int8+fp16": (0.012, 0.3), "int8/int4+fp16": (0.12, 0.35), "int4+fp16": (0.15, 0.25), "int2+fp16": (0.5, 0.65),
          "fp8+fp16": (0.045, 0.65)}
"""Relative L1 with rotation at most, and as a share of that without, where there are outliers in one operand's channels."""


@pytest.mark.parametrize("case", ["one of K", "four of K", "of Q and of K", "of both, far out", "of both, the same"])
@pytest.mark.parametrize("spec", LIMITS)
def test_outlier_channels_spoil_no_others(spec, case):
    given = drawn(case)
    rotated, plain = error(*given, f"{spec} rotate"), error(*given, spec)
    assert rotated < LIMITS[spec][0] and rotated < LIMITS[spec][1] * plain, (rotated, plain)


@pytest.mark.parametrize("spec", LIMITS)
def test_where_no_channel_is_larger_nothing_is_lost(spec):
    given = drawn("none")
    assert error(*given, f"{spec} rotate") < 1.05 * error(*given, spec)


@pytest.mark.parametrize("fill", [0.0, 3.0, "one channel"])
def test_channels_without_any_value_do_no_harm(fill):
    q, k, v = drawn("none", tokens=100)
    if fill == "one channel":
        q[..., 3], k[..., 8], k[..., 3] = 0, 0, 0
        assert error(q, k, v, "int8+fp16 rotate") < 0.03
        return
    out, lse = reference.lowbit_attention(q * 0 + fill, k * 0 + fill, v, q_format="int8", k_format="int8", pv_format="fp16",
                                          rotate=True, scale=0.125)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), v.shape), atol=1e-3)
    assert np.isfinite(lse).all()


def test_the_lse_and_causal_masks_heed_rotation():
    q, k, v = drawn("one of K", tokens=200)
    q, k[..., 7] = np.concatenate([q, q[:, ::-1]], 1), k[..., 7] + 5
    run = lambda **more: reference.lowbit_attention(
        q, k, v, q_format="int8", k_format="int8", pv_format="fp16", granularity="token", scale=0.125, causal=True, **more)
    exact, rotated, plain = reference.attn_fwd(q, k, v, scale=0.125, causal=True), run(rotate=True), run()
    for part, limit in enumerate((0.05, 0.05)):
        assert np.abs(rotated[part] - exact[part]).max() < limit < np.abs(plain[part] - exact[part]).max()
