"""`ulysses()`: each rank computes some heads for all tokens; before and after, shares of the tokens become shares of the heads.

Where the attention has codes, Q, K and V are quantised once, before they travel, with statistics of all tokens (K's mean and
V's largest values come together in one small exchange), and the codes are what travels and what the kernel takes. Heads go in
pieces, so that the exchange of one is under way while another is computed.
Source: DeepSpeed Ulysses (arXiv 2309.14509) for the exchange of shares; here of codes, of any number of tokens and heads.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_video.kernels.exchange.layout import Copy, Kind, Layout, joins, layout_of

from ..engine import codes as engine
from ..engine.checks import check_finite
from ..engine.codes import AttentionCodes, Codes
from ..engine.options import AttentionOptions
from ..errors import UnsupportedError
from ..hook.attend import Attend, coded
from ..runtime.detect import runtime_of
from ..runtime.protocol import Runtime
from . import values
from .exchange import check_exchange, on_the_wire
from .group import Group, without
from .pieces import QUERY_ROWS, Piece, head_pieces
from .rows import Rows
from .shares import begins
from .statistics import shared_statistics, token_counts


def ulysses(attend: Attend, group: Group, exchange: str = "auto", output: str = "16bit", shares: Sequence[int] | None = None,
            kv_shares: Sequence[int] | None = None) -> Attend:
    """Attention of tokens that the ranks of a group share, by sharing out its heads.

    attend: what computes the heads; another wrapper, such as `ring`, too.
    group: each rank's tensors are [B, its tokens, H, D]; the tokens of all follow each other in the order of its places.
    exchange, output: of exchange.EXCHANGES and OUTPUTS.
    shares: tokens of each rank; None asks the others at every call (the host waits). kv_shares: of K and V where they differ.
    Codes with a scale per 128 keys need shares of whole blocks of 128 but the last (`shares.token_shares` makes them); others
    travel in 16 bits.
    Raises ValueError for an exchange that does not exist, and in a call for fewer heads than ranks.
    """
    check_exchange(exchange, output)
    return Ulysses(attend, group, exchange, output, shares, kv_shares)


class Ulysses:
    """See `ulysses`."""

    def __init__(self, attend: Attend, group: Group, exchange: str, output: str, shares: Sequence[int] | None,
                 kv_shares: Sequence[int] | None) -> None:
        self.attend, self.group, self.exchange, self.output = attend, group, exchange, output
        self.shares, self.kv_shares = shares, shares if kv_shares is None else kv_shares
        self.inner = coded(attend)

    def __call__(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None, return_lse: bool = False
                 ) -> Any:
        if self.group.size == 1:
            return self.attend(q, k, v, is_causal, scale, return_lse)
        runtime = runtime_of(q)
        heads, size = runtime.shape(k)[2], self.group.size
        if heads < size:
            raise ValueError(f"{heads} heads cannot be shared by {size} ranks: each needs at least one; use a smaller ulysses "
                             "degree, and a ring for the rest")
        own = (runtime.shape(q)[1], runtime.shape(k)[1])
        counts = token_counts(own, q, self.shares, self.kv_shares, self.group, runtime)
        options = self._options(q, k, v, counts, is_causal, scale, return_lse, runtime)
        if options is None:
            return values.by_heads(self.attend, self.group, q, k, v, counts, (is_causal, scale, return_lse), runtime)
        return self._by_codes(q, k, v, counts, options, is_causal, return_lse, runtime)

    def share_statistics(self, found: Any, q_count: int, kv_count: int, options: AttentionOptions, runtime: Runtime) -> Any:
        """Statistics of all tokens of this group, and of groups further in, from those of this rank's."""
        counts = token_counts((q_count, kv_count), found, self.shares, self.kv_shares, self.group, runtime)
        return shared_statistics(found, counts, self.group, self.inner, options, runtime)

    def _options(self, q, k, v, counts, is_causal, scale, return_lse, runtime: Runtime) -> AttentionOptions | None:
        """The choices of a call by codes, its scale a number; None where values must travel as they are."""
        if self.exchange == "16bit" or self.inner is None:
            return None
        options = on_the_wire(self.inner.options(is_causal, scale, return_lse), self.exchange)
        try:
            reason = engine.why_no_codes(q, k, v, options, runtime, sum(counts[0]), sum(counts[1]))
        except (UnsupportedError, TypeError):
            return None  # the attention itself will say so, or fall back
        if reason is None and engine.kind_of(q, options, runtime).joins_blocks and any(b % 128 for b in begins(counts[1])):
            reason = f"shares of {', '.join(map(str, counts[1]))} tokens are not whole blocks of 128"
        if reason is not None:
            self.group.traffic.note(f"in 16 bits: {reason}")
            return None
        check_finite(options, runtime, q=q, k=k, v=v)
        return options.scaled(runtime.shape(q)[-1])

    def _by_codes(self, q, k, v, counts, options: AttentionOptions, is_causal: bool, return_lse: bool, runtime: Runtime) -> Any:
        batch, tokens, heads, head_dim = runtime.shape(q)
        found = engine.statistics(q, k, v, options, runtime)
        tiles = batch * -(-sum(counts[0]) // QUERY_ROWS.get(head_dim, 128))
        pieces = head_pieces(heads, self.group.size, tiles, runtime.processors(q))
        arrivals = [Arrival(self.group, piece, q, k, v, counts, options, runtime) for piece in pieces]
        if found is not None:
            found = shared_statistics(found, counts, self.group, self.inner, options, runtime,
                                      meanwhile=lambda: [arrival.quantise_q() for arrival in arrivals])
        for arrival in arrivals:
            arrival.send(found)
        out = runtime.empty((batch, tokens, heads, head_dim), runtime.dtype_name(q), q)
        back, lses = [], []
        for piece, arrival in zip(pieces, arrivals):
            part, lse = self.inner.of_codes(arrival.codes(), is_causal, return_lse)
            back.append(Rows(part, piece, counts[0], self.group, self.output, runtime))
            if return_lse:
                lses.append(values.rows_of_lse(lse, piece.shares, counts[0], self.group, runtime))
        for rows in back:
            rows.place(out)
        return (out, runtime.contiguous(runtime.concat(lses, 1))) if return_lse else out


class Arrival:
    """The codes of a piece of heads: quantised, sent, and joined when they are asked for."""

    def __init__(self, group: Group, piece: Piece, q, k, v, counts, options: AttentionOptions, runtime: Runtime) -> None:
        cut = slice(piece.first, piece.first + piece.count)
        self.group, self.cut, self.runtime, self.options, self.dtype = group, cut, runtime, options, runtime.dtype_name(q)
        self.tensors = [x[:, :, cut] for x in (q, k, v)]
        kind = engine.kind_of(q, options, runtime)
        self.plan = _plan(kind, runtime.shape(q)[0], piece, tuple(counts[0]), tuple(counts[1]), group.rank)
        self.sent = runtime.empty((self.plan.records.size,), "uint8", q)
        self.has_q = False

    def quantise_q(self) -> None:
        """Q's codes, where no statistics of all tokens are needed: there is time for it while those are gathered."""
        if not engine.q_needs_statistics(self.options):
            self._encode(None, "q")
            self.has_q = True

    def _encode(self, found: Any, of: str | None) -> None:
        engine.encode(*self.tensors, found, self.plan.records, self.options, self.runtime, self.sent, of)

    def send(self, found: Any) -> None:
        """Quantises what is left and lets it go. found: statistics of all tokens and heads."""
        plan, group, runtime = self.plan, self.group, self.runtime
        own = None if found is None else runtime.contiguous(found[:, :, self.cut])
        self._encode(own, "kv" if self.has_q else None)
        scale = engine.v_scale_of(own, self.options, slice(plan.first, plan.first + plan.heads))
        self.v_scale = None if scale is None else runtime.contiguous(scale)
        self.received = runtime.empty((sum(plan.received_bytes),), "uint8", self.sent)
        (batch, tokens, count, head_dim), kv_tokens = runtime.shape(self.tensors[0]), runtime.shape(self.tensors[1])[1]
        others = count - plan.heads
        record = plan.records.record
        self.outgoing = without(self.sent, plan.first * record, (plan.first + plan.heads) * record, runtime)
        self.work = group.exchange(self.outgoing, plan.sent_bytes, self.received, plan.received_bytes, "attention in",
                                   in_16_bit=others * batch * head_dim * 2 * (tokens + 2 * kv_tokens))

    def codes(self) -> AttentionCodes:
        """The codes of these heads for all tokens."""
        self.work.wait()
        plan = self.plan
        memory = self.runtime.empty((plan.q.size + plan.kv.size,), "uint8", self.received)
        engine.copy_parts((self.received, self.sent), memory, plan.copies, plan.q.batch, plan.heads, self.runtime)
        q, kv = Codes(memory, plan.q), Codes(memory, plan.kv, plan.q.size)
        return AttentionCodes(q, kv, self.v_scale, self.options, self.dtype)


@dataclass(frozen=True)
class Plan:
    """What the exchange of a piece of heads depends on, all but the tensors.

    records: of this rank's tokens. first, heads: this rank's among the piece's. sent_bytes, received_bytes: by place. q, kv:
    where the codes of all tokens go. copies: from what was received, and from this rank's own records, to there.
    """

    records: Layout
    first: int
    heads: int
    sent_bytes: list[int]
    received_bytes: list[int]
    q: Layout
    kv: Layout
    copies: tuple[Copy, ...]


@functools.lru_cache(maxsize=1024)
def _plan(kind: Kind, batch: int, piece: Piece, q_counts: tuple[int, ...], kv_counts: tuple[int, ...], rank: int) -> Plan:
    heads, first = piece.shares[rank], sum(piece.shares[:rank])
    records = layout_of(kind, batch, piece.count, q_counts[rank], kv_counts[rank], records=True)
    layouts = [layout_of(kind, batch, heads, *lengths, records=True) for lengths in zip(q_counts, kv_counts)]
    sent_bytes, received_bytes = [count * records.record for count in piece.shares], [layout.size for layout in layouts]
    sent_bytes[rank] = received_bytes[rank] = 0
    q, kv = layout_of(kind, batch, heads, sum(q_counts), 0), layout_of(kind, batch, heads, 0, sum(kv_counts))
    copies = []
    for place, layout in enumerate(layouts):
        own = place == rank
        begin = first * records.record if own else sum(received_bytes[:place])
        for target, target_begin, counts in ((q, 0, q_counts), (kv, q.size, kv_counts)):
            copies += joins(records if own else layout, begin, target, target_begin, sum(counts[:place]), second=own)
    return Plan(records, first, heads, sent_bytes, received_bytes, q, kv, tuple(copies))
