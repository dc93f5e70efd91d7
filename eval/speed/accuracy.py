"""Error of one attention output against float32 softmax, on sampled rows, computed on the host."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

EDGE_ROWS, RANDOM_ROWS = 48, 64
"""Rows checked of every sampled head: this many at either end, and this many between."""


@dataclass(frozen=True)
class Reference:
    """Float32 attention on sampled rows of sampled heads: heads [(b, h)], rows [R], values [len(heads), R, D]."""

    heads: tuple[tuple[int, int], ...]
    rows: np.ndarray
    values: np.ndarray


def sample_rows(tokens: int, seed: int = 0) -> np.ndarray:
    """Sorted row indices: both ends and some between, without repeats."""
    if tokens <= 2 * EDGE_ROWS + RANDOM_ROWS:
        return np.arange(tokens)
    middle = np.random.default_rng(seed).choice(np.arange(EDGE_ROWS, tokens - EDGE_ROWS), RANDOM_ROWS, replace=False)
    return np.sort(np.concatenate([np.arange(EDGE_ROWS), middle, np.arange(tokens - EDGE_ROWS, tokens)]))


def softmax_rows(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray, q_len: int, scale: float,
                 causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Attention of some query rows of one head in float32: out [R, D] and natural-log LSE [R].

    q: [R, D] the rows themselves; k, v: [Nkv, D]; rows: their indices among q_len. Causal is aligned bottom-right; a
    row that sees no key gives zeros and -inf.
    """
    scores = (q.astype(np.float32) @ k.astype(np.float32).T) * np.float32(scale)
    if causal:
        visible = np.arange(k.shape[0])[None, :] <= rows[:, None] + (k.shape[0] - q_len)
        scores = np.where(visible, scores, -np.inf)
    top = scores.max(1, keepdims=True, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - safe)
    total = weights.sum(1, keepdims=True)
    out = (weights @ v.astype(np.float32)) / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = np.log(total[:, 0]) + safe[:, 0]
    return out, lse


def reference(runtime: Any, q: Any, k: Any, v: Any, *, scale: float, causal: bool = False) -> Reference:
    """Float32 attention of [B, H, N, D] tensors on sampled rows of the first and the last head."""
    batch, q_heads, q_len, _ = runtime.shape(q)
    group = q_heads // runtime.shape(k)[1]
    heads = tuple(dict.fromkeys([(0, 0), (batch - 1, q_heads - 1)]))
    rows = sample_rows(q_len)
    values = []
    for b, h in heads:
        one_q, one_k, one_v = (runtime.to_numpy(x) for x in (q[b, h], k[b, h // group], v[b, h // group]))
        values.append(softmax_rows(one_q[rows], one_k, one_v, rows, q_len, scale, causal)[0])
    return Reference(heads, rows, np.stack(values))


def errors(runtime: Any, out: Any, wanted: Reference) -> tuple[float, float]:
    """(relative L1, SQNR in dB) of out [B, H, N, D] against a reference; NaN if any sampled element is."""
    got = np.stack([runtime.to_numpy(out[b, h])[wanted.rows] for b, h in wanted.heads])
    return relative_l1(got, wanted.values), sqnr_db(got, wanted.values)


def relative_l1(got: np.ndarray, wanted: np.ndarray) -> float:
    """Sum of absolute differences over the sum of absolute wanted values."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    return float(np.abs(got - wanted).sum() / max(np.abs(wanted).sum(), 1e-30))


def sqnr_db(got: np.ndarray, wanted: np.ndarray) -> float:
    """Signal to quantisation noise ratio in dB: 10 log10(sum wanted^2 / sum (got - wanted)^2)."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    noise = np.square(got - wanted).sum()
    return float("inf") if noise == 0 else float(10 * np.log10(max(np.square(wanted).sum(), 1e-300) / noise))
