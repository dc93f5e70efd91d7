"""NumPy beside the kernels of pooled attention: their oracle, and what CPUs run.

A pooled tile of n keys enters the softmax as one key, the mean of theirs, with the weight of n; its value is the mean of their
values. What runs exactly is chosen by the error that pooling would make: the tile's weight times the spread of its scores times
the spread of its values, from means over tiles alone.
Source: the weight of a pooled key, the logarithm of its length added to its score, is the proportional attention of token
merging (arXiv 2210.09461, section 3); here runs of keys are pooled by a query tile's own choice, and the choice is by error.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..blas_threads import one_blas_thread
from ..formats import LN_2, LOG2_E, MIN_MAGNITUDE
from .tiles import KEY_TILE, always_tiles, kept_tiles, query_tile

ROUNDED = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
"""What pooled keys and values are kept in, by the tensors' format."""


class TileStats(NamedTuple):
    """What a choice knows of K and V, per key tile: keys, values [B, Hkv, tiles, D] (means, rounded), k_var [B, Hkv, tiles, D],
    v_spread [B, Hkv, tiles], the root of V's variances' sum; float32. lengths: int [tiles]."""

    keys: np.ndarray
    values: np.ndarray
    k_var: np.ndarray
    v_spread: np.ndarray
    lengths: np.ndarray


def tiles_of(x: np.ndarray, rows: int) -> list[np.ndarray]:
    """x [B, H, N, D] in tiles of so many rows, the last one shorter."""
    return [x[:, :, first:first + rows] for first in range(0, x.shape[2], rows)]


def tile_stats(k: np.ndarray, v: np.ndarray, k_mean: np.ndarray | None, format: str = "fp32") -> TileStats:
    """Means and spreads of each key tile of k, v [B, Hkv, N, D] float32; K less its mean [B, Hkv, D] over all tokens."""
    means = [np.stack([tile.mean(axis=2, dtype=np.float64) for tile in tiles_of(x, KEY_TILE)], axis=2) for x in (k, v)]
    spreads = [np.stack([tile.var(axis=2, dtype=np.float64) for tile in tiles_of(x, KEY_TILE)], axis=2) for x in (k, v)]
    keys = means[0] if k_mean is None else means[0].astype(np.float32) - k_mean[:, :, None]
    rounded = lambda x: x.astype(np.float32).astype(ROUNDED[format]).astype(np.float32)
    lengths = np.array([tile.shape[2] for tile in tiles_of(k, KEY_TILE)])
    return TileStats(rounded(keys), rounded(means[1]), spreads[0].astype(np.float32),
                     np.sqrt(spreads[1].sum(-1)).astype(np.float32), lengths)


def error_scores(q: np.ndarray, stats: TileStats, scale: float) -> np.ndarray:
    """Base-2 logarithm of the error of pooling each key tile for each query tile, but for a term of the query tile's.

    q: [B, Hq, N, D] float32. The error is m sqrt(sum_d A_d var(k_d)) sqrt(sum_d var(v_d)): m the weight by the tiles' means,
    A_d the mean of q_d squared.
    Returns float32 [B, Hq, query tiles, key tiles].
    """
    group = q.shape[1] // stats.keys.shape[1]
    of_queries = lambda x: np.repeat(x, group, axis=1)
    tiles = tiles_of(q, query_tile(q.shape[-1]))
    mean = np.stack([tile.mean(axis=2, dtype=np.float64) for tile in tiles], axis=2).astype(np.float32)
    square = np.stack([(tile.astype(np.float64)**2).mean(axis=2) for tile in tiles], axis=2).astype(np.float32)
    weight = mean @ of_queries(stats.keys).swapaxes(2, 3) * np.float32(scale * LOG2_E)
    weight += np.log2(stats.lengths).astype(np.float32)
    spread = np.maximum(square @ of_queries(stats.k_var).swapaxes(2, 3), np.float32(MIN_MAGNITUDE))
    values = np.log2(np.maximum(of_queries(stats.v_spread), np.float32(MIN_MAGNITUDE)))
    return weight + np.float32(0.5) * np.log2(spread) + values[:, :, None]


def choose(scores: np.ndarray, keep: Sequence[float], always: int, head_dim: int) -> np.ndarray:
    """Which key tiles each query tile takes exactly: bool [B, Hq, query tiles, key tiles].

    scores: of `error_scores`. keep: a share of the tiles for each head, rounded up; of equal scores the first counts as larger.
    Always chosen, and counted first: the tiles of the first `always` keys, the last tile, and for query tiles with any of the
    first `always` rows all.
    """
    batch, heads, rows, tiles = scores.shape
    forced = np.zeros((rows, tiles), bool)
    forced[:, :always_tiles(always, tiles)] = True
    forced[:, -1] = True
    forced[np.arange(rows) * query_tile(head_dim) < always] = True
    counts = np.array([kept_tiles(share, tiles) for share in keep])
    counts = np.maximum(counts[:, None], forced.sum(1))[None, :, :, None]  # [1, Hq, query tiles, 1]
    order = np.argsort(-np.where(forced, np.inf, scores), axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(tiles), order.shape), axis=-1)
    return rank < counts


@one_blas_thread()
def pooled_part(q: np.ndarray, stats: TileStats, chosen: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Attention over the tiles that are not chosen, as one key each: out [B, Hq, N, D], natural-log LSE [B, Hq, N].

    The LSE is that of the smoothed K. Rows for which every tile is chosen give zeros and -inf.
    """
    batch, heads, tokens, head_dim = q.shape
    group = heads // stats.keys.shape[1]
    out, lse = np.zeros(q.shape, np.float32), np.full(q.shape[:3], -np.inf, np.float32)
    rows = query_tile(head_dim)
    bias = np.log2(stats.lengths).astype(np.float32)
    for i_b, i_h, i_m in np.ndindex(chosen.shape[:3]):
        pooled = ~chosen[i_b, i_h, i_m]
        if pooled.any():
            mine = slice(i_m * rows, min((i_m + 1) * rows, tokens))
            keys, values = (x[i_b, i_h // group, pooled] for x in (stats.keys, stats.values))
            s = q[i_b, i_h, mine] @ keys.T * np.float32(scale * LOG2_E) + bias[pooled]
            top = s.max(axis=1, keepdims=True)
            p = np.exp2(s - top)
            total = p.sum(axis=1, keepdims=True)
            out[i_b, i_h, mine] = p @ values / total
            lse[i_b, i_h, mine] = ((top + np.log2(total)) * np.float32(LN_2))[:, 0]
    return out, lse
