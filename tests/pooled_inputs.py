"""Inputs of pooled attention: tokens that change slowly along the sequence, as a video's do, so that tiles differ."""
from __future__ import annotations

import numpy as np


def smooth_qkv(q_shape, kv_heads=None, kv_len=None, seed=0, dtype=np.float32, layout="HND", run=48):
    """q [B, H, N, D], k, v [B, Hkv, Nkv, D]: every `run` tokens share a normal vector, and each has noise of its own.

    V's channels and heads differ in size; K has an offset. NHD: views of [B, N, H, D] memory.
    """
    rng = np.random.default_rng(seed)
    batch, heads, q_len, dim = q_shape
    kv_heads, kv_len = kv_heads or heads, kv_len or q_len

    def draw(heads, tokens, noise):
        base = rng.standard_normal((batch, heads, -(-tokens // run), dim), np.float32).repeat(run, axis=2)[:, :, :tokens]
        size = rng.uniform(0.2, 1.0, (batch, heads, -(-tokens // run), 1)).astype(np.float32).repeat(run, axis=2)[:, :, :tokens]
        return base + noise * size * rng.standard_normal((batch, heads, tokens, dim), np.float32)

    q, k, v = draw(heads, q_len, 0.5), draw(kv_heads, kv_len, 0.7), draw(kv_heads, kv_len, 0.7)
    k += 2 * rng.standard_normal((1, kv_heads, 1, dim), np.float32)
    v *= np.exp(0.5 * rng.standard_normal((batch, kv_heads, 1, dim), np.float32))
    if layout == "NHD":
        return [np.ascontiguousarray(x.swapaxes(1, 2)).astype(dtype).swapaxes(1, 2) for x in (q, k, v)]
    return [x.astype(dtype) for x in (q, k, v)]
