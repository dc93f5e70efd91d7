"""The tiles of pooled attention: rows that choose together, keys that are pooled together, and how many are kept.

The same for every backend, so that all of them keep the same keys.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

from ..formats import BLOCK_K
from ..quant.shapes import ceil_div

KEY_TILE = BLOCK_K
"""Keys that are pooled together; at block granularity also those that share a scale."""
POOLED_FROM = 4096
"""Keys from which pooling is offered where only what is faster is wanted: with 30 % kept it takes 0.74 and 0.95 of dense
attention's time there (head dims 64 and 128 on an H100, eval/speed/experiments/pooled.json), at 2048 keys 1.01 and 1.28."""
SLACK = 1e-6
"""Of a tile: a share that is a whole number of tiles but for its rounding is that number."""


def query_tile(head_dim: int) -> int:
    """Query rows that choose together: those that a program of the Hopper kernel has, 192 up to head dim 64, else 128."""
    return 192 if head_dim <= 64 else 128


def kept_tiles(keep: float, tiles: int) -> int:
    """How many key tiles a share of all of them is, rounded up."""
    return min(tiles, max(0, math.ceil(keep * tiles - SLACK)))


def always_tiles(always: int, tiles: int) -> int:
    """Key tiles at the beginning that hold any of the first `always` keys."""
    return min(tiles, ceil_div(always, KEY_TILE))


def counted_tiles(keep: float, always: int, q_len: int, kv_len: int, head_dim: int) -> tuple[int, int]:
    """How many pairs of a query tile and a key tile of one head are kept, and how many pooled, whatever the tensors hold."""
    rows, tiles = ceil_div(q_len, query_tile(head_dim)), ceil_div(kv_len, KEY_TILE)
    with_text = min(rows, ceil_div(always, query_tile(head_dim)))  # these see every key
    others = max(kept_tiles(keep, tiles), min(tiles, always_tiles(always, tiles) + 1))
    kept = with_text * tiles + (rows - with_text) * others
    return kept, rows * tiles - kept


def runs_of_heads(keep: Sequence[float]) -> list[tuple[int, int, float]]:
    """(first head, heads, share) of neighbours with the same share; keep: one for each head."""
    runs: list[tuple[int, int, float]] = []
    for head, share in enumerate(keep):
        if runs and runs[-1][2] == share:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, share)
        else:
            runs.append((head, 1, share))
    return runs
