"""`HeadsPart`: a piece of the heads in Ulysses' exchange of codes: quantised, sent, computed, sent back, put in its place.

What goes to another rank is quantised into one piece of memory for it, what stays here into its final place. Queries are read
where they arrived, one rank's after the other's; only keys and values are joined. The queries of the others come first, so that
their results travel while this rank's own, which are written where they belong, are computed.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lowbit_video.kernels.exchange.layout import Copy, Kind, Layout, joins, layout_of

from ..engine import codes as engine
from ..engine.codes import AttentionCodes, Codes
from ..engine.codes_target import Target
from ..engine.options import AttentionOptions
from ..hook.attend import CodedAttend
from ..runtime.protocol import Runtime
from . import values
from .group import ITEM_SIZES, Group
from .pieces import Piece
from .rows import Rows


@dataclass(frozen=True)
class Plan:
    """What the exchange of a piece depends on, all but the tensors; lists go by place in the group.

    first, heads: this rank's heads among all. firsts: everyone's first head. sent, received: layouts of what goes to and comes
    from each rank, None for this one, beginning at sent_begins and received_begins. q, kv: where this rank's queries (joined:
    all), and all keys and values, are. q_copies, kv_copies: from what arrived to there.
    """

    first: int
    heads: int
    firsts: list[int]
    sent: list[Layout | None]
    sent_begins: list[int]
    received: list[Layout | None]
    received_begins: list[int]
    q: Layout
    kv: Layout
    q_copies: tuple[Copy, ...]
    kv_copies: tuple[Copy, ...]


def sizes_of(layouts: list[Layout | None]) -> list[int]:
    """Bytes of each, 0 for None."""
    return [0 if layout is None else layout.size for layout in layouts]


@functools.lru_cache(maxsize=1024)
def plan_of(kind: Kind, batch: int, piece: Piece, q_counts: tuple[int, ...], kv_counts: tuple[int, ...], rank: int, joined: bool
            ) -> Plan:
    """The plan of a piece. joined: whether all queries are put together."""
    others = [place != rank for place in range(len(q_counts))]
    heads, firsts = piece.shares[rank], [piece.first + sum(piece.shares[:place]) for place in range(len(q_counts))]
    sent = [layout_of(kind, batch, count, q_counts[rank], kv_counts[rank], True) if other else None
            for count, other in zip(piece.shares, others)]
    received = [layout_of(kind, batch, heads, *lengths, True) if other else None
                for lengths, other in zip(zip(q_counts, kv_counts), others)]
    begins = [[sum(sizes_of(layouts)[:place]) for place in range(len(others))] for layouts in (sent, received)]
    q = layout_of(kind, batch, heads, sum(q_counts) if joined else q_counts[rank], 0, True)
    kv = layout_of(kind, batch, heads, 0, sum(kv_counts), True)
    q_copies, kv_copies = [], []
    for place, layout in enumerate(received):
        if layout is not None:
            kv_copies += joins(layout, begins[1][place], kv, 0, sum(kv_counts[:place]))
            q_copies += joins(layout, begins[1][place], q, 0, sum(q_counts[:place])) if joined else []
    return Plan(firsts[rank], heads, firsts, sent, begins[0], received, begins[1], q, kv, tuple(q_copies), tuple(kv_copies))


class HeadsPart:
    """One piece of heads on its way, by `quantise_q`, `send` and `compute`; `rows.place` ends it.

    tensors: q, k, v [B, this rank's tokens, H, D]. counts: tokens of each rank. out: [B, own tokens, H, D], contiguous.
    joined: compute the queries of all ranks in one, as a ring within and a causal mask need it.
    """

    def __init__(self, inner: CodedAttend, group: Group, output: str, piece: Piece, tensors: tuple[Any, Any, Any],
                 counts: tuple[list[int], list[int]], options: AttentionOptions, out: Any, joined: bool, runtime: Runtime
                 ) -> None:
        self.inner, self.group, self.output, self.piece = inner, group, output, piece
        self.tensors, self.counts, self.options, self.out = tensors, counts, options, out
        self.joined, self.runtime = joined, runtime
        q = tensors[0]
        self.batch, self.dtype = runtime.shape(q)[0], runtime.dtype_name(q)
        kind = engine.kind_of(q, options, runtime)
        self.plan = plan = plan_of(kind, self.batch, piece, *map(tuple, counts), group.rank, joined)
        memory = lambda size: runtime.empty((size,), "uint8", q)
        self.sent, self.received = memory(sum(sizes_of(plan.sent))), memory(sum(sizes_of(plan.received)))
        self.q_memory, self.kv_memory = memory(plan.q.size), memory(plan.kv.size)
        self.firsts = sum(counts[0][:group.rank]) if joined else 0, sum(counts[1][:group.rank])
        self.q_is_done = False

    def quantise_q(self) -> None:
        """Q's codes, where no statistics of all tokens are needed: there is time for it while those are gathered."""
        if not engine.q_needs_statistics(self.options):
            self._encode(None, "q")
            self.q_is_done = True

    def _encode(self, found: Any, of: str) -> None:
        """Codes of Q, or of K and V, for every rank."""
        plan = self.plan
        for place, layout in enumerate(plan.sent):
            first, count = plan.firsts[place], self.piece.shares[place]
            cut = tuple(x[:, :, first:first + count] for x in self.tensors)
            where: dict[str, Any] = dict(memory=self.sent, begin=plan.sent_begins[place])
            if layout is None:
                layout, memory = (plan.q, self.q_memory) if of == "q" else (plan.kv, self.kv_memory)
                where = dict(memory=memory, first=self.firsts)
            engine.encode(cut, found, layout, self.options, self.runtime, head=first, of=of, **where)

    def send(self, found: Any) -> None:
        """Quantises what is left and lets it go. found: statistics of all tokens and heads."""
        for of in ("kv",) if self.q_is_done else ("q", "kv"):
            self._encode(found, of)
        self.v_scale = engine.v_scale_of(found, self.options, slice(self.plan.first, self.plan.first + self.plan.heads))
        if self.v_scale is not None:
            self.v_scale = self.runtime.contiguous(self.runtime.permute(self.v_scale, (1, 0, 2)))
        (_, tokens, _, head_dim), kv_tokens = self.runtime.shape(self.tensors[0]), self.runtime.shape(self.tensors[1])[1]
        others = (self.piece.count - self.plan.heads) * self.batch * head_dim
        self.work = self.group.exchange(self.sent, sizes_of(self.plan.sent), self.received, sizes_of(self.plan.received),
                                        "attention in", in_16_bit=others * 2 * (tokens + 2 * kv_tokens))

    def compute(self, is_causal: bool, return_lse: bool) -> Any:
        """Attention of these heads, whose rows then travel. Returns the LSE of this rank's tokens [B, heads, own], or None."""
        self.work.wait()
        plan = self.plan
        engine.copy_parts((self.received,), self.kv_memory, plan.kv_copies, self.batch, plan.heads, self.runtime)
        lses = self._all_in_one(is_causal, return_lse) if self.joined else self._one_by_one(return_lse)
        if not return_lse:
            return None
        lse = self.runtime.permute(self.runtime.concat(lses, 2), (1, 0, 2))
        return values.rows_of_lse(lse, self.piece.shares, self.counts[0], self.group, self.runtime)

    def _codes(self, queries: Codes) -> AttentionCodes:
        return AttentionCodes(queries, Codes(self.kv_memory, self.plan.kv), self.v_scale, self.options, self.dtype)

    def _one_by_one(self, return_lse: bool) -> list[Any]:
        """The queries of each rank, this one's last. Returns their LSEs [heads, B, tokens], by place."""
        plan, rank, tokens = self.plan, self.group.rank, self.counts[0]
        (_, own, all_heads, head_dim), size = self.runtime.shape(self.out), ITEM_SIZES[self.dtype]
        theirs = [0 if place == rank else count for place, count in enumerate(tokens)]
        back = self.runtime.empty((sum(theirs), self.batch, plan.heads, head_dim), self.dtype, self.out)
        row = self.batch * plan.heads * head_dim
        lses: list[Any] = [None] * len(tokens)
        for place in [place for place in range(len(tokens)) if place != rank]:
            queries = Codes(self.received, plan.received[place], plan.received_begins[place])
            target = Target(back, sum(theirs[:place]) * row * size, (head_dim, plan.heads * head_dim, row))
            lses[place] = self.inner.of_codes(self._codes(queries), False, return_lse, target=target)[1]
        self.rows = Rows(back, theirs, self.piece, tokens, self.group, self.output, self.runtime)
        target = Target(self.out, plan.first * head_dim * size, (head_dim, own * all_heads * head_dim, all_heads * head_dim))
        lses[rank] = self.inner.of_codes(self._codes(Codes(self.q_memory, plan.q)), False, return_lse, target=target)[1]
        return lses

    def _all_in_one(self, is_causal: bool, return_lse: bool) -> list[Any]:
        """The queries of all ranks together. Returns their LSE [heads, B, all tokens]."""
        plan, runtime, tokens = self.plan, self.runtime, self.counts[0]
        engine.copy_parts((self.received,), self.q_memory, plan.q_copies, self.batch, plan.heads, runtime)
        part, lse = self.inner.of_codes(self._codes(Codes(self.q_memory, plan.q)), is_causal, return_lse)
        part = runtime.contiguous(runtime.permute(part, (0, 2, 1, 3)))
        self.rows = Rows(part, tokens, self.piece, tokens, self.group, self.output, runtime)
        return [lse]
