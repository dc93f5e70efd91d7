"""`ulysses()`: each rank computes some heads for all tokens; before and after, shares of the tokens become shares of the heads.

Where the attention has codes, Q, K and V are quantised once, before they travel, with statistics of all tokens (K's mean and
V's largest values come together in one small exchange), and the codes are what travels and what the kernel takes. Heads go in
pieces, so that the exchange of one is under way while another is computed.
Source: DeepSpeed Ulysses (arXiv 2309.14509) for the exchange of shares; here of codes, of any number of tokens and heads.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowbit_video.kernels.exchange.layout import Layout, joins

from ..engine import codes as engine
from ..engine.codes import AttentionCodes, Codes
from ..engine.options import AttentionOptions
from ..errors import UnsupportedError
from ..hook.attend import Attend, coded
from ..runtime.detect import runtime_of
from ..runtime.protocol import Runtime
from . import values
from .exchange import check_exchange, on_the_wire
from .group import Group
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
        except UnsupportedError:
            return None  # the attention itself will say so, or fall back
        if reason is None and engine.kind_of(q, options, runtime).joins_blocks and any(b % 128 for b in begins(counts[1])):
            reason = f"shares of {', '.join(map(str, counts[1]))} tokens are not whole blocks of 128"
        if reason is not None:
            self.group.traffic.note(f"in 16 bits: {reason}")
            return None
        return options.scaled(runtime.shape(q)[-1])

    def _by_codes(self, q, k, v, counts, options: AttentionOptions, is_causal: bool, return_lse: bool, runtime: Runtime) -> Any:
        batch, tokens, heads, head_dim = runtime.shape(q)
        found = engine.statistics(q, k, v, options, runtime)
        if found is not None:
            found = shared_statistics(found, counts, self.group, self.inner, options, runtime)
        tiles = batch * -(-sum(counts[0]) // QUERY_ROWS.get(head_dim, 128))
        pieces = head_pieces(heads, self.group.size, tiles, runtime.processors(q))
        arrivals = [Arrival(self.group, piece, q, k, v, found, counts, options, runtime) for piece in pieces]
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
    """The codes of a piece of heads: quantised and sent when made, joined when asked for."""

    def __init__(self, group: Group, piece: Piece, q, k, v, found, counts, options: AttentionOptions, runtime: Runtime) -> None:
        cut = slice(piece.first, piece.first + piece.count)
        batch, tokens, _, head_dim = runtime.shape(q)
        kv_tokens, dtype = runtime.shape(k)[1], runtime.dtype_name(q)
        kind = engine.kind_of(q, options, runtime)
        self.runtime, self.options, self.dtype, self.counts, self.group = runtime, options, dtype, counts, group
        own = None if found is None else runtime.contiguous(found[:, :, cut])
        records = Layout(kind, batch, piece.count, tokens, kv_tokens, records=True)
        self.sent = engine.encode(q[:, :, cut], k[:, :, cut], v[:, :, cut], own, records, options, runtime)
        self.heads = piece.shares[group.rank]
        first = sum(piece.shares[:group.rank])
        scale = engine.v_scale_of(own, options, slice(first, first + self.heads))
        self.v_scale = None if scale is None else runtime.contiguous(scale)
        self.records = [Layout(kind, batch, self.heads, *lengths, records=True) for lengths in zip(*counts)]
        sizes = [layout.size for layout in self.records]
        self.received = runtime.empty((sum(sizes),), "uint8", q)
        others = piece.count - self.heads
        self.work = group.exchange(self.sent, [count * records.record for count in piece.shares], self.received, sizes,
                                   "attention in", in_16_bit=others * batch * head_dim * 2 * (tokens + 2 * kv_tokens))
        self.whole = [Layout(kind, batch, self.heads, sum(counts[0]), 0), Layout(kind, batch, self.heads, 0, sum(counts[1]))]

    def codes(self) -> AttentionCodes:
        """The codes of these heads for all tokens."""
        self.work.wait()
        sizes, copies = [layout.size for layout in self.records], []
        q_whole, kv_whole = self.whole
        memory = self.runtime.empty((q_whole.size + kv_whole.size,), "uint8", self.received)
        for place, layout in enumerate(self.records):
            begin, q_first, kv_first = sum(sizes[:place]), sum(self.counts[0][:place]), sum(self.counts[1][:place])
            copies += joins(layout, begin, q_whole, 0, q_first) + joins(layout, begin, kv_whole, q_whole.size, kv_first)
        engine.copy_parts(self.received, memory, copies, q_whole.batch, self.heads, self.runtime)
        q, kv = Codes(memory, q_whole), Codes(memory, kv_whole, q_whole.size)
        return AttentionCodes(q, kv, self.v_scale, self.options, self.dtype)
