"""`KeysPart`: a piece of the heads whose keys and values come together: everyone's codes are gathered, and each rank's queries
attend over all of them at once.

Where codes travel this takes a ring's place: there is nothing to merge, a tile of queries begins once and not once a rank, and
what is computed is what one GPU computes. It holds the codes of all keys, one byte a value, which a ring does not.
"""
from __future__ import annotations

import functools
from typing import Any

from lowbit_video.kernels.exchange.layout import Copy, Kind, Layout, joins, layout_of
from lowbit_video.kernels.formats import BLOCK_K

from ..engine import codes as engine
from ..engine.codes import AttentionCodes, Codes
from ..engine.codes_target import Target
from ..engine.options import AttentionOptions
from ..hook.attend import CodedAttend
from ..runtime.protocol import Runtime
from .group import ITEM_SIZES, Group
from .mesh import ranks_of_a_host
from .pieces import Piece
from .shares import begins

MOST_BYTES = 2**31
"""Codes of all keys and values up to which they are gathered: 128K tokens of 48 heads of 128 channels take 1.6e9."""


def can_gather(kind: Kind, batch: int, heads: int, kv_counts: list[int], inner: CodedAttend, group: Group) -> bool:
    """Whether the codes of all keys are put together: shares of whole blocks where codes go by blocks, no wrapper within that
    shares them further, one host (between hosts a transfer takes as long as attention, which hides it if keys go round), and no
    more than MOST_BYTES. kv_counts: keys of each rank. inner: what attends. group: of the ranks that share the keys.
    """
    if kind.joins_blocks and any(begin % BLOCK_K for begin in begins(kv_counts)) or hasattr(inner, "share_statistics"):
        return False
    hosts = {rank // ranks_of_a_host(group.wire.size) for rank in group.ranks}
    return len(hosts) == 1 and layout_of(kind, batch, heads, 0, sum(kv_counts)).size <= MOST_BYTES


@functools.lru_cache(maxsize=1024)
def copies_of(layouts: tuple[Layout, ...], whole: Layout, arrived: tuple[int, ...], rank: int) -> tuple[Copy, ...]:
    """Those that put the codes of each rank, by place, to where they belong among all; this one's are in a second source.

    arrived: the byte that each rank's codes begin at.
    """
    copies = []
    for place, (layout, first) in enumerate(zip(layouts, begins([layout.kv_len for layout in layouts]))):
        own = place == rank
        copies += joins(layout, 0 if own else arrived[place], whole, 0, first, second=own)
    return tuple(copies)


class KeysPart:
    """One piece of heads on its way, by `quantise_q`, `send` and `compute`.

    tensors: q, k, v [B, this rank's tokens, H, D]. kv_counts: keys of each rank. options: their scale a number.
    out: [B, own tokens, H, D], contiguous, where `compute` writes the piece's heads.
    """

    def __init__(self, inner: CodedAttend, group: Group, piece: Piece, tensors: tuple[Any, Any, Any], kv_counts: list[int],
                 options: AttentionOptions, out: Any, runtime: Runtime) -> None:
        self.inner, self.group, self.piece, self.out, self.options, self.runtime = inner, group, piece, out, options, runtime
        self.tensors = tuple(x[:, :, piece.first:piece.first + piece.count] for x in tensors)
        batch, tokens, _, _ = runtime.shape(out)
        kind = engine.kind_of(tensors[0], options, runtime)
        self.q_layout = layout_of(kind, batch, piece.count, tokens, 0)
        self.layouts = tuple(layout_of(kind, batch, piece.count, 0, count) for count in kv_counts)
        self.kv_layout = layout_of(kind, batch, piece.count, 0, sum(kv_counts))
        self.q_memory = None

    def quantise_q(self) -> None:
        """Q's codes, where no statistics of all tokens are needed: there is time for it while those are gathered."""
        if not engine.q_needs_statistics(self.options):
            self._quantise_q(None)

    def _quantise_q(self, found: Any) -> None:
        self.q_memory = engine.encode(self.tensors, found, self.q_layout, self.options, self.runtime, head=self.piece.first)

    def send(self, found: Any) -> None:
        """Quantises this rank's keys and values and lets them go. found: statistics of all tokens and heads."""
        runtime, own = self.runtime, self.layouts[self.group.rank]
        self.sent = engine.encode(self.tensors, found, own, self.options, runtime, head=self.piece.first)
        self.found = found
        values = 2 * 2 * own.batch * own.heads * own.kind.head_dim * own.kv_len
        sizes = [layout.size for layout in self.layouts]
        self.received, self.begins, self.work = self.group.start_gather(self.sent, sizes, runtime, "ring", in_16_bit=values)

    def compute(self, return_lse: bool) -> Any:
        """Attention of these heads, written to their place. Returns the LSE of this rank's tokens [B, heads, own], or None."""
        runtime, piece, out = self.runtime, self.piece, self.out
        if self.q_memory is None:
            self._quantise_q(self.found)
        batch, tokens, heads, head_dim = runtime.shape(out)
        memory = runtime.empty((self.kv_layout.size,), "uint8", out)
        self.work.wait()
        copies = copies_of(self.layouts, self.kv_layout, tuple(self.begins), self.group.rank)
        engine.copy_parts((self.received, self.sent), memory, copies, batch, piece.count, runtime)
        scale = engine.v_scale_of(self.found, self.options, slice(piece.first, piece.first + piece.count))
        dtype = runtime.dtype_name(out)
        codes = AttentionCodes(Codes(self.q_memory, self.q_layout), Codes(memory, self.kv_layout), scale, self.options, dtype)
        row = heads * head_dim
        target = Target(out, piece.first * head_dim * ITEM_SIZES[dtype], (tokens * row, head_dim, row))
        return self.inner.of_codes(codes, False, return_lse, target=target)[1]
