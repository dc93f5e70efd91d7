"""How the codes of Q, K and V lie in one piece of memory, for one process or on their way to another.

Part after part, each [B, H, ..], or [H, B, ..] where heads come first. Each part of one (batch, head) is `rows` rows of bytes
that grow with the tokens, by token or by block of 128 of them.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from ..formats import BLOCK_K, get_format, scale_block
from ..quant.shapes import ceil_div

ALIGNMENT = 128
"""Bytes between the beginnings of parts; TMA needs 16."""


class Part(NamedTuple):
    """One part of a head's codes.

    rows: its bytes are in so many rows (V's transposed codes: one a channel). step: bytes that a token, or a block of tokens,
    adds to each row. of: "q" or "kv", whose tokens count. offset: of its first byte.
    """

    rows: int
    step: int
    by_block: bool
    of: str
    dtype: str
    offset: int = 0

    def row_bytes(self, tokens: int) -> int:
        """Bytes of one row for so many tokens."""
        return (ceil_div(tokens, BLOCK_K) if self.by_block else tokens) * self.step


@dataclass(frozen=True)
class Kind:
    """What decides which parts there are. q, k, pv: format names. granularity: K's. v_dtype: of a V that stays in 16 (or 32)
    bits. bias, shift: whether smoothing's score bias and LSE shift lie beside the codes."""

    head_dim: int
    q: str
    k: str
    pv: str
    granularity: str
    v_dtype: str
    bias: bool = False
    shift: bool = False

    def parts(self) -> dict[str, Part]:
        """The parts in their order, Q's first, without offsets."""
        code = lambda name: get_format(name)
        parts = {"q_codes": Part(1, self.head_dim // code(self.q).codes_per_byte, False, "q", code(self.q).storage),
                 "q_scale": Part(1, 4, False, "q", "float32")}
        if self.shift:
            parts["lse_shift"] = Part(1, 4, False, "q", "float32")
        parts["k_codes"] = Part(1, self.head_dim // code(self.k).codes_per_byte, False, "kv", code(self.k).storage)
        parts["k_scale"] = Part(1, 4, scale_block("k", self.granularity) is not None, "kv", "float32")
        if self.pv == "fp8":
            parts["v"] = Part(self.head_dim, BLOCK_K, True, "kv", code("fp8").storage)
        else:
            parts["v"] = Part(1, self.head_dim * (4 if self.v_dtype == "float32" else 2), False, "kv", self.v_dtype)
        if self.bias:
            parts["bias"] = Part(1, 4, False, "kv", "float32")
        return parts

    @property
    def joins_blocks(self) -> bool:
        """Whether parts of the tokens can be joined only at whole blocks of 128 of them."""
        return any(part.by_block for part in self.parts().values())


class Layout:
    """Where the codes of [B, heads] lie; `layout_of` makes them.

    q_len, kv_len: tokens; 0 leaves Q, or K and V, out. heads_first: [heads, B] in memory, and for the kernels, which read it in
    its order. parts: by name, with their offsets. size: bytes in all.
    """

    def __init__(self, kind: Kind, batch: int, heads: int, q_len: int, kv_len: int, heads_first: bool = False) -> None:
        self.kind, self.batch, self.heads, self.heads_first = kind, batch, heads, heads_first
        self.q_len, self.kv_len = q_len, kv_len
        self.parts: dict[str, Part] = {}
        offset = 0
        for name, part in kind.parts().items():
            tokens = self.tokens(part)
            if tokens:
                self.parts[name] = part._replace(offset=offset)
                offset += ceil_div(batch * heads * part.rows * part.row_bytes(tokens), ALIGNMENT) * ALIGNMENT
        self.size = offset

    @property
    def order(self) -> tuple[int, int]:
        """(batch, heads) in memory's order: what the attention kernels take for batch and heads."""
        return (self.heads, self.batch) if self.heads_first else (self.batch, self.heads)

    def tokens(self, part: Part) -> int:
        """How many tokens a part is of."""
        return self.q_len if part.of == "q" else self.kv_len

    def strides(self, name: str) -> tuple[int, int, int]:
        """Bytes from one batch, head and row of a part to the next."""
        part = self.parts[name]
        row = part.row_bytes(self.tokens(part))
        one = part.rows * row
        return (one, self.batch * one, row) if self.heads_first else (self.heads * one, one, row)


@functools.lru_cache(maxsize=4096)
def layout_of(kind: Kind, batch: int, heads: int, q_len: int, kv_len: int, heads_first: bool = False) -> Layout:
    """The layout of these sizes; the same sizes give the same object, so that it can be a key."""
    return Layout(kind, batch, heads, q_len, kv_len, heads_first)


class Copy(NamedTuple):
    """Bytes from one memory to another, for each batch and head: `rows` rows of `count` bytes each; offsets and the strides of
    batch, head and row are in bytes too. second: from the second of two sources."""

    source: int
    source_batch: int
    source_head: int
    source_row: int
    target: int
    target_batch: int
    target_head: int
    target_row: int
    rows: int
    count: int
    second: bool = False


def joins(source: Layout, begin: int, target: Layout, target_begin: int, first: int, second: bool = False) -> list[Copy]:
    """The copies that put the codes of a share of the tokens to where they belong among all.

    source: of the share, from byte `begin` on; target: of all tokens, from byte `target_begin` on, the same batch and heads;
    what it has no part for (Q's, or K's and V's) is left out. first: the share's first token; a whole block where a part goes
    by blocks. second: of two sources, it is the second.
    """
    copies = []
    for name, into in target.parts.items():
        part = source.parts.get(name)
        if part is None:
            continue
        if part.by_block and first % BLOCK_K:
            raise AssertionError(f"{name} of a share that begins at token {first} cannot be joined: not a whole block")
        from_batch, from_head, from_row = source.strides(name)
        to_batch, to_head, to_row = target.strides(name)
        there = target_begin + into.offset + part.row_bytes(first)
        copies.append(Copy(begin + part.offset, from_batch, from_head, from_row, there, to_batch, to_head, to_row, part.rows,
                           part.row_bytes(source.tokens(part)), second))
    return copies
