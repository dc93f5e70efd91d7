"""Inputs and exact answers that several tests share."""
from __future__ import annotations

import numpy as np

from lowbit_video.eval import world

EDGES_OF_TILES = [(2, 128), (2, 129), (2, 130), (64, 128), (64, 129), (64, 190), (64, 191), (64, 192)]
"""(q_len, kv_len): under a causal mask the keys that the first or the last row of a tile sees end just before, at and just
behind the end of 64 or 128 keys."""


def sqnr_db(value, reference):
    """Signal to quantisation noise, dB."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return 10 * np.log10((reference**2).sum() / ((value - reference) ** 2).sum())


def qkv(batch=1, heads=2, kv_heads=None, q_len=200, kv_len=None, dim=64, seed=0, k_offset=4.0):
    """Standard normal [B, N, H, D] float32 arrays, one channel of K shifted, as real K is."""
    rng = np.random.default_rng(seed)
    kv_heads, kv_len = kv_heads or heads, kv_len or q_len
    q = rng.standard_normal((batch, q_len, heads, dim), dtype=np.float32)
    k = rng.standard_normal((batch, kv_len, kv_heads, dim), dtype=np.float32)
    v = rng.standard_normal((batch, kv_len, kv_heads, dim), dtype=np.float32)
    k[..., dim // 3] += k_offset
    return q, k, v


def drawn_to_the_diagonal(q, k, pull=0.75):
    """K [B, Hkv, Nk, D] whose keys i + Nk - Nq and the one behind it are drawn towards query i of q [B, Hq, Nq, D].

    What a causal mask shows a row last and what it hides first weigh most: a mask that is one key off moves every row.
    """
    batch, kv_heads, kv_len, dim = k.shape
    q_len = q.shape[2]
    towards = pull * q.reshape(batch, kv_heads, -1, q_len, dim).sum(2)
    drawn = k.copy()
    for hidden in (0, 1):
        keys = np.arange(q_len) + kv_len - q_len + hidden
        there = (keys >= 0) & (keys < kv_len)
        drawn[:, :, keys[there]] += towards[:, :, there].astype(k.dtype)
    return drawn


def naive_attention(q, k, v, scale=None, causal=False):
    """Float64 softmax attention of NHD arrays, bottom-right causal: (out [B, N, H, D], lse [B, H, N])."""
    q, k, v = (np.asarray(a, np.float64).transpose(0, 2, 1, 3) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = q @ k.transpose(0, 1, 3, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        nq, nk = s.shape[2:]
        s = np.where(np.arange(nk) > np.arange(nq)[:, None] + nk - nq, -np.inf, s)
    top = np.maximum(s.max(-1, keepdims=True), -1e300)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return (p / np.where(total == 0, 1, total) @ v).transpose(0, 2, 1, 3), lse


def clip_of(caption, seed=0, frames=world.FRAMES):
    """The true clip of a caption of the small world, uint8 [F, H, W, 3]; ValueError for one that the world cannot show."""
    meaning = world.parse(caption)
    if not meaning.complete:
        raise ValueError(f"cannot draw {caption!r}: {world.hint(caption)}")
    return np.round(world.render(world.plan([meaning], seed, frames))[0]).astype(np.uint8)
