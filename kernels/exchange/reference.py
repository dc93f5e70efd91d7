"""NumPy beside the exchange's kernels: their oracle, and what CPUs run."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .layout import Copy, Layout


def part_of(memory: np.ndarray, layout: Layout, name: str) -> np.ndarray:
    """A part of a layout's memory (uint8 [bytes]) as uint8 [B, heads, rows, bytes of a row], to read or write."""
    part = layout.parts[name]
    shape = (layout.batch, layout.heads, part.rows, part.row_bytes(layout.tokens(part)))
    return np.lib.stride_tricks.as_strided(memory[part.offset:], shape, (*layout.strides(name), 1))


def copy_parts(sources: Sequence[np.ndarray], target: np.ndarray, copies: Sequence[Copy], batch: int, heads: int) -> None:
    """Does the copies from one or two memories to another (uint8 [bytes])."""
    strided = np.lib.stride_tricks.as_strided
    for one in copies:
        shape = (batch, heads, one.rows, one.count)
        into = strided(target[one.target:], shape, (one.target_batch, one.target_head, one.target_row, 1))
        into[...] = strided(sources[one.second][one.source:], shape, (one.source_batch, one.source_head, one.source_row, 1))


def combine_stats(gathered: np.ndarray, weights: np.ndarray, means: int) -> np.ndarray:
    """Statistics of all tokens from those of the shares.

    gathered: float32 [shares, statistics, n]; the first `means` statistics are means, the others absolute maxima.
    weights: float32 [means, shares], each share's part of the tokens.
    Returns float32 [statistics, n].
    """
    out = gathered.max(axis=0)
    out[:means] = np.einsum("rmn,mr->mn", gathered[:, :means].astype(np.float64), weights)
    return out.astype(np.float32)


def merge(outs: Sequence[np.ndarray], lses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Attention over all keys from attention over parts of them.

    outs: [B, H, N, D]; lses: [B, H, N], natural log. A row that saw no key in any part gives zeros and -inf.
    """
    top = np.max(lses, axis=0)
    safe = np.where(np.isneginf(top), np.float32(0), top)
    weights = [np.exp(lse - safe) for lse in lses]
    total = np.sum(weights, axis=0)
    out = sum(part * weight[..., None] for part, weight in zip(outs, weights)) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return out.astype(np.float32), (safe + np.log(total)).astype(np.float32)
