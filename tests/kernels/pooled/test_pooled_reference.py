"""Pooled attention in NumPy: against brute force in float64, the choice against a sort, shares against whole tiles."""
from __future__ import annotations

import numpy as np
import pytest

from lowbit_video.kernels.attention.reference import attn_fwd, lowbit_attention
from lowbit_video.kernels.exchange.reference import merge
from lowbit_video.kernels.pooled import reference, tiles
from lowbit_video.kernels.quant.reference import token_mean
from pooled_inputs import smooth_qkv

from helpers import sqnr_db


def brute(q, k, v, chosen, scale):
    """(out, lse) in float64: each row's own keys, and one key a tile that is not chosen, written out."""
    rows, group = tiles.query_tile(q.shape[-1]), q.shape[1] // k.shape[1]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, h, n in np.ndindex(q.shape[:3]):
        mine = chosen[b, h, n // rows]
        scores, values = [], []
        for tile in range(len(mine)):
            keys, vals = (x[b, h // group, tile * 128:(tile + 1) * 128].astype(np.float64) for x in (k, v))
            if not mine[tile]:
                scores.append(np.array([q[b, h, n] @ keys.mean(0) * scale + np.log(len(keys))]))
                values.append(vals.mean(0)[None])
            else:
                scores.append(keys @ q[b, h, n] * scale)
                values.append(vals)
        s, x = np.concatenate(scores), np.concatenate(values)
        top = s.max()
        p = np.exp(s - top)
        out[b, h, n], lse[b, h, n] = p @ x / p.sum(), top + np.log(p.sum())
    return out, lse


@pytest.mark.parametrize("shape, kv_heads, kv_len", [((1, 2, 200, 64), 1, 300), ((2, 1, 130, 128), 1, 257),
                                                     ((1, 1, 3, 32), 1, 5), ((1, 1, 193, 64), 1, 256)], ids=str)
def test_against_brute_force(shape, kv_heads, kv_len):
    q, k, v = smooth_qkv(shape, kv_heads, kv_len)
    scale, mean = 0.2, token_mean(k)
    stats = reference.tile_stats(k, v, mean)
    chosen = reference.choose(reference.error_scores(q, stats, scale), [0.4] * shape[1], 0, shape[-1])
    assert not chosen.all() or kv_len < 128
    exact = attn_fwd(q, k - mean[:, :, None], v, scale=scale, chosen=chosen)
    out, lse = merge(*zip(exact, reference.pooled_part(q, stats, chosen, scale)))
    shift = scale * np.einsum("bhnd,bhd->bhn", q, mean.repeat(shape[1] // kv_heads, 1))
    wanted, wanted_lse = brute(q, k, v, chosen, scale)
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    np.testing.assert_allclose(lse + shift, wanted_lse, atol=2e-5)


def test_scores_against_brute_force():
    q, k, v = smooth_qkv((1, 2, 400, 64), 1, 300)
    found = reference.error_scores(q, reference.tile_stats(k, v, token_mean(k)), 0.125)
    for h, m in np.ndindex(2, 3):
        rows = q[0, h, m * 192:(m + 1) * 192].astype(np.float64)
        wanted = []
        for tile in range(3):
            keys, vals = (x[0, 0, tile * 128:(tile + 1) * 128].astype(np.float64) for x in (k, v))
            weight = len(keys) * np.exp(rows.mean(0) @ keys.mean(0) * 0.125)
            wanted.append(np.log2(weight * np.sqrt((rows**2).mean(0) @ keys.var(0)) * np.sqrt(vals.var(0).sum())))
        wanted = np.array(wanted)
        np.testing.assert_allclose(found[0, h, m] - found[0, h, m, 0], wanted - wanted[0], atol=1e-3)


@pytest.mark.parametrize("always", [0, 1, 128, 129, 200, 10**6], ids=str)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0], ids=str)
def test_the_choice_is_the_largest_scores_and_what_is_forced(keep, always):
    scores = np.random.default_rng(0).standard_normal((2, 2, 3, 11)).astype(np.float32).round(1)  # with ties
    chosen = reference.choose(scores, [keep, 0.3], always, 64)
    for b, h, m in np.ndindex(2, 2, 3):
        forced = [t for t in range(11) if t < -(-always // 128) or t == 10 or m * 192 < always]
        count = max(len(forced), [int(np.ceil(11 * keep)), 4][h])
        order = sorted(range(11), key=lambda t: (t not in forced, -scores[b, h, m, t], t))
        assert sorted(order[:count]) == np.flatnonzero(chosen[b, h, m]).tolist()
    for h, share in enumerate((keep, 0.3)):
        kept = int(chosen[0, h].sum())
        assert tiles.counted_tiles(share, always, 3 * 192 - 5, 11 * 128 - 7, 64) == (kept, 33 - kept)


@pytest.mark.parametrize("keep, count, kept", [(0.0, 10, 0), (0.1, 10, 1), (0.07, 100, 7), (0.3, 10, 3), (0.31, 10, 4),
                                               (1.0, 7, 7), (1e-3, 10, 1), (0.7, 10, 7), (1 / 3, 3, 1), (0.999999, 1, 1)])
def test_shares_are_rounded_up_to_whole_tiles(keep, count, kept):
    assert tiles.kept_tiles(keep, count) == kept


def test_runs_of_heads():
    assert tiles.runs_of_heads([0.3, 0.3, 0.5, 0.3]) == [(0, 2, 0.3), (2, 1, 0.5), (3, 1, 0.3)]
    assert tiles.runs_of_heads([0.2]) == [(0, 1, 0.2)]


def test_pooling_beats_dropping_and_the_choice_beats_lots():
    """What the method is for: at the same share kept, less error than without the pooled keys, and than by lots."""
    q, k, v = smooth_qkv((1, 2, 1200, 64), run=100)
    exact, _ = attn_fwd(q, k, v, scale=0.125)
    stats = reference.tile_stats(k, v, None)
    chosen = reference.choose(reference.error_scores(q, stats, 0.125), [0.5, 0.5], 0, 64)
    lots = np.random.default_rng(1).permuted(chosen, axis=-1)
    lots[..., -1] = True
    quality = {}
    for name, mask in (("chosen", chosen), ("lots", lots)):
        kept = attn_fwd(q, k, v, scale=0.125, chosen=mask)
        quality[name] = sqnr_db(merge(*zip(kept, reference.pooled_part(q, stats, mask, 0.125)))[0], exact)
        quality[f"{name}, dropped"] = sqnr_db(kept[0], exact)
    assert quality["chosen"] > quality["chosen, dropped"] + 2 and quality["chosen"] > quality["lots"] + 1, quality


@pytest.mark.parametrize("smooth_k", [False, True])
def test_at_low_bit(smooth_k):
    """Near its own float32, and with all kept the same as attention without pooling, to the bit."""
    q, k, v = smooth_qkv((1, 2, 500, 64))
    options = dict(q_format="int8", k_format="int8", pv_format="fp16", scale=0.125, smooth_k=smooth_k)
    out, lse = lowbit_attention(q, k, v, **options, keep=[0.4, 0.6])
    stats = reference.tile_stats(k, v, None)
    chosen = reference.choose(reference.error_scores(q, stats, 0.125), [0.4, 0.6], 0, 64)
    wanted, wanted_lse = brute(q, k, v, chosen, 0.125)
    assert sqnr_db(out, wanted) > 34 and np.abs(lse - wanted_lse).max() < 0.08
    for one, other in zip(lowbit_attention(q, k, v, **options, keep=[1.0, 1.0]), lowbit_attention(q, k, v, **options)):
        np.testing.assert_allclose(one, other, atol=1e-6)
