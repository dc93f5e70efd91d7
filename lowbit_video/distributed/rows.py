"""Attention's output on its way back: this rank's heads of everyone's tokens become its tokens of everyone's heads."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowbit_video.kernels.exchange.layout import Copy

from ..engine import codes as engine
from ..engine import rows as row_codes
from ..runtime.protocol import Runtime
from .group import ITEM_SIZES, Group, as_bytes, without
from .pieces import Piece


class Rows:
    """The output of a piece of heads: sent when made, put among all heads when asked for.

    part: [N, B, this rank's heads of the piece, D], contiguous. held: whose tokens it has, by place: all of `tokens`, or this
    rank's own left out (0), where they are in their place already. tokens: of each rank. output: "16bit", or "int8" with a
    scale a row; this rank's own rows are never rounded.
    """

    def __init__(self, part: Any, held: Sequence[int], piece: Piece, tokens: Sequence[int], group: Group, output: str,
                 runtime: Runtime) -> None:
        _, batch, heads, head_dim = runtime.shape(part)
        self.runtime, self.piece, self.group, self.part = runtime, piece, group, part
        self.tokens, self.own, self.before = tokens[group.rank], held[group.rank], sum(held[:group.rank])
        self.dtype, self.batch, self.head_dim, self.coded = runtime.dtype_name(part), batch, head_dim, output == "int8"
        others = [0 if place == group.rank else count for place, count in enumerate(held)]
        theirs = [0 if place == group.rank else count for place, count in enumerate(piece.shares)]
        if self.coded:
            self.sent, sent_bytes = row_codes.encode_rows(part, held, group.rank, runtime)
            self.sizes = [row_codes.rows_size(self.tokens, batch, count, head_dim) for count in theirs]
        else:
            item = batch * head_dim * ITEM_SIZES[self.dtype]
            row = heads * item
            self.sent = without(as_bytes(part, runtime), self.before * row, (self.before + self.own) * row, runtime)
            sent_bytes, self.sizes = [count * row for count in others], [self.tokens * count * item for count in theirs]
        self.received = runtime.empty((sum(self.sizes),), "uint8", part)
        self.work = group.exchange(self.sent, sent_bytes, self.received, self.sizes, "attention out",
                                   in_16_bit=sum(others) * batch * heads * head_dim * 2)

    def place(self, out: Any) -> None:
        """Writes the heads of the piece that were not there yet into out [B, own tokens, H, D], contiguous."""
        self.work.wait()
        copies = []
        for place, heads in enumerate(self.piece.shares):
            first, begin = self.piece.first + sum(self.piece.shares[:place]), sum(self.sizes[:place])
            if place == self.group.rank:
                copies += [self._copy(0, first, heads, out, own=True)] if self.own else []
            elif self.coded:
                row_codes.decode_rows(self.received, begin, out, first, heads, self.runtime)
            else:
                copies.append(self._copy(begin, first, heads, out, own=False))
        if copies:
            engine.copy_parts((self.received, self.part), out, copies, self.batch, 1, self.runtime)

    def _copy(self, begin: int, first: int, heads: int, out: Any, own: bool) -> Copy:
        """Rows [tokens, B, heads, D] to heads of out."""
        size = ITEM_SIZES[self.dtype]
        row, target_row = heads * self.head_dim * size, self.runtime.shape(out)[2] * self.head_dim * size
        begin += self.before * self.batch * row if own else 0
        return Copy(begin, row, 0, self.batch * row, first * self.head_dim * size, self.tokens * target_row, 0, target_row,
                    self.tokens, row, own)
