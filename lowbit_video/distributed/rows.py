"""Attention's output on its way back: this rank's heads of everyone's tokens become its tokens of everyone's heads."""
from __future__ import annotations

from typing import Any

from lowbit_video.kernels.exchange.layout import Copy

from ..engine import codes as engine
from ..engine import rows as row_codes
from ..runtime.protocol import Runtime
from .group import ITEM_SIZES, Group, as_bytes
from .pieces import Piece


class Rows:
    """The output of a piece of heads: sent when made, put among all heads when asked for.

    part: [N, B, this rank's heads of the piece, D], contiguous. tokens: of each rank. output: "16bit", or "int8" with a scale
    a row.
    """

    def __init__(self, part: Any, piece: Piece, tokens: list[int], group: Group, output: str, runtime: Runtime) -> None:
        _, batch, own_heads, head_dim = runtime.shape(part)
        self.runtime, self.piece, self.tokens, self.group = runtime, piece, tokens[group.rank], group
        self.dtype = runtime.dtype_name(part)
        self.shape = (batch, head_dim)
        others = (sum(tokens) - self.tokens) * batch * own_heads * head_dim
        self.coded = output == "int8"
        if self.coded:
            self.sent, sent_sizes = row_codes.encode_rows(part, tokens, runtime)
            self.sizes = [row_codes.rows_size(self.tokens, batch, heads, head_dim) for heads in piece.shares]
        else:
            item = batch * head_dim * ITEM_SIZES[self.dtype]
            self.sent, sent_sizes = as_bytes(part, runtime), [count * own_heads * item for count in tokens]
            self.sizes = [self.tokens * heads * item for heads in piece.shares]
        self.received = runtime.empty((sum(self.sizes),), "uint8", part)
        self.work = group.exchange(self.sent, sent_sizes, self.received, self.sizes, "attention out", in_16_bit=others * 2)

    def place(self, out: Any) -> None:
        """Writes the heads of the piece into out [B, own tokens, H, D], contiguous."""
        self.work.wait()
        batch, head_dim = self.shape
        begins = [sum(self.sizes[:place]) for place in range(self.group.size)]
        firsts = [self.piece.first + sum(self.piece.shares[:place]) for place in range(self.group.size)]
        if self.coded:
            for begin, first, heads in zip(begins, firsts, self.piece.shares):
                row_codes.decode_rows(self.received, begin, out, first, heads, self.runtime)
            return
        size = ITEM_SIZES[self.dtype]
        row = self.runtime.shape(out)[2] * head_dim * size
        copies = [Copy(begin, heads * head_dim * size, 0, batch * heads * head_dim * size, first * head_dim * size,
                       self.tokens * row, 0, row, self.tokens, heads * head_dim * size)
                  for begin, first, heads in zip(begins, firsts, self.piece.shares)]
        engine.copy_parts(self.received, out, copies, batch, 1, self.runtime)
