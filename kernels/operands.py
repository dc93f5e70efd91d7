"""What launchers take: operands (a tensor with its shape, strides and format) and packed sequences, as values."""
from __future__ import annotations

from typing import NamedTuple

from .buffers import Buffer, as_buffer
from .formats import get_format
from .quant.shapes import row_strides, v_tokens

Shape = tuple[int, int, int, int]
"""(batch, heads, tokens, head dim) of what an operand stands for; packed: (sequences, heads, tokens of all, head dim)."""


class Operand(NamedTuple):
    """q, k, v, out, or the codes of one.

    strides: of batch (0 where packed), head and token, in elements of the buffer; the last dimension is contiguous. In V's
    transposed FP8 codes the third is that of a channel. format: of what the buffer holds, by name. scale: float32, one for
    each `block` rows, or for each row where that is None; for V's codes one for each channel. scale_strides: of the scales of
    batch and head, where they are not contiguous; the quantisers heed them, the attention kernels want contiguous ones.
    """

    buffer: Buffer
    shape: Shape
    strides: tuple[int, int, int]
    format: str
    scale: Buffer | None = None
    block: int | None = None
    scale_strides: tuple[int, int] | None = None


class Sequences(NamedTuple):
    """cu: int32 [S + 1], where each of S packed sequences begins; longest: tokens of the longest one."""

    cu: Buffer
    longest: int


class Packed(NamedTuple):
    """How a variable-length batch is packed: the sequences of Q's rows and of K's and V's."""

    q: Sequences
    k: Sequences


class Listed(NamedTuple):
    """The key tiles that each query tile takes exactly (`kernels.pooled`); what the others came to is in the output already.

    tiles: int32 [B, Hq, query tiles, key tiles], of each row the first `count`, ascending; the last key tile is among them.
    count: int32 [B, Hq, query tiles], at least 1. scale: float32, K's scale of each tile that is listed, where it lies in
    `tiles`; None where every key has one. part_lse: float32 [B, Hq, Nq], the log-sum-exp to base 2 of the others' scores, as
    the attention kernel has them: of smoothed keys; -inf where the output is not to be read. query_tile: rows. heavy: query
    tiles at the beginning of each head that take all key tiles, which had better not come last.
    """

    tiles: Buffer
    count: Buffer
    scale: Buffer | None
    part_lse: Buffer
    query_tile: int
    heavy: int = 0


def codes_of(x: Operand, format: str, buffer: Buffer, scale: Buffer, block: int | None, packed: bool = False) -> Operand:
    """The operand that x's quantised rows make: contiguous codes of `format`, packed along the head dim."""
    _, heads, tokens, head_dim = x.shape
    fmt = get_format(format)
    columns = head_dim // fmt.codes_per_byte
    strides = (*row_strides(heads, tokens * columns, packed), columns)
    return Operand(as_buffer(buffer, fmt.storage), x.shape, strides, format, scale, block)


def v_codes_of(v: Operand, buffer: Buffer, scale: Buffer, packed: bool = False) -> Operand:
    """The operand that V's FP8 codes make: [.., D, tokens padded], a scale for each channel."""
    sequences, heads, tokens, head_dim = v.shape
    padded = v_tokens(tokens, sequences if packed else None)
    strides = (*row_strides(heads, head_dim * padded, packed), padded)
    return Operand(as_buffer(buffer, get_format("fp8").storage), v.shape, strides, "fp8", scale)
