"""Shapes of what the quantisers write, for padded batches and for variable-length ones.

A variable-length batch is S sequences packed along T tokens. Where a sequence needs whole blocks (block
scales, V's transposed copy), sequence s starts at block `cu_seqlens[s] // block + s`: room for every
sequence's own last, partly filled block, found from cu_seqlens alone.
"""
from __future__ import annotations

from ..formats import BLOCK_K, get_format

STATS_CHUNK = 512
"""Tokens that one program of the first statistics pass reduces."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def scale_count(tokens: int, block: int | None, sequences: int | None = None) -> int:
    """Scales of one head's tokens, one per `block` rows (None: per row). sequences: their number, where they are packed."""
    if block is None:
        return tokens
    return ceil_div(tokens, block) if sequences is None else tokens // block + sequences


def v_tokens(tokens: int, sequences: int | None = None) -> int:
    """Tokens of V's transposed FP8 copy, padded to whole blocks; sequences: their number, if packed."""
    return scale_count(tokens, BLOCK_K, sequences) * BLOCK_K


def row_strides(heads: int, rows: int, packed: bool) -> tuple[int, int]:
    """Strides of batch and head of a contiguous [B, H, rows], or packed [H, rows], array."""
    return (0 if packed else heads * rows, rows)


def code_shape(shape: tuple[int, int, int, int], format: str, varlen: bool = False) -> tuple[int, ...]:
    """Shape of the packed codes of x of `shape` (B, H, N, D); varlen: (S, H, T, D), then without the batch."""
    batch, heads, tokens, head_dim = shape
    packed = head_dim // get_format(format).codes_per_byte
    return (heads, tokens, packed) if varlen else (batch, heads, tokens, packed)


def scale_shape(shape: tuple[int, int, int, int], block: int | None, varlen: bool = False) -> tuple[int, ...]:
    """Shape of Q's or K's float32 scales, one per `block` rows, or one per row where that is None (`formats.scale_block`)."""
    batch, heads, tokens, _ = shape
    count = scale_count(tokens, block, batch if varlen else None)
    return (heads, count) if varlen else (batch, heads, count)


def v_code_shape(shape: tuple[int, int, int, int], varlen: bool = False) -> tuple[int, ...]:
    """Shape of V's transposed FP8 copy."""
    batch, heads, tokens, head_dim = shape
    padded = v_tokens(tokens, batch if varlen else None)
    return (heads, head_dim, padded) if varlen else (batch, heads, head_dim, padded)


def partial_shape(shape: tuple[int, int, int, int], max_len: int | None = None) -> tuple[int, int, int, int]:
    """Shape of the float32 scratch of the statistics' first pass, of each tensor that it reduces."""
    batch, heads, tokens, head_dim = shape
    return (batch, heads, ceil_div(max_len or tokens, STATS_CHUNK), head_dim)
