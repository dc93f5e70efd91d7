"""`ulysses()`: each rank computes some heads for all tokens; before and after, shares of the tokens become shares of the heads.

Where the attention has codes, Q, K and V are quantised once, before they travel, with statistics of all tokens (K's mean and
V's largest values come together in one small exchange), and the codes are what travels and what the kernel takes: `heads_part`.
Source: DeepSpeed Ulysses (arXiv 2309.14509) for the exchange of shares; here of codes, of any number of tokens and heads.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine import codes as engine
from ..engine.checks import check_finite, refuse_gradients
from ..engine.options import AttentionOptions
from ..errors import UnsupportedError
from ..hook.attend import Attend, coded
from ..runtime.detect import runtime_of
from ..runtime.protocol import Runtime
from . import values
from .exchange import check_exchange, on_the_wire
from .group import Group
from .heads_part import HeadsPart
from .pieces import head_pieces, rows_in_tiles
from .shares import begins
from .statistics import computed, shared_statistics, token_counts


def ulysses(attend: Attend, group: Group, exchange: str = "auto", output: str = "16bit", shares: Sequence[int] | None = None,
            kv_shares: Sequence[int] | None = None) -> Attend:
    """Attention of tokens that the ranks of a group share, by sharing out its heads.

    attend: what computes the heads; another wrapper, such as `ring`, too.
    group: each rank's tensors are [B, its tokens, H, D]; the tokens of all follow each other in the order of its places.
    exchange, output: of exchange.EXCHANGES and OUTPUTS.
    shares: tokens of each rank; None asks the others at every call (the host waits). kv_shares: of K and V where they differ.
    Codes with a scale per 128 keys need shares of whole blocks of 128 but the last (`shares.token_shares` makes them); others
    travel in 16 bits.
    Raises ValueError for an exchange that does not exist, and in a call for fewer heads than ranks; UnsupportedError in a call
    that asks for gradients: none travel back.
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
        refuse_gradients(runtime, q, k, v)
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
        tiles = rows_in_tiles(batch, max(counts[0]), head_dim)
        out = runtime.empty((batch, tokens, heads, head_dim), runtime.dtype_name(q), q)
        # a ring within, and a causal mask, want the queries of all ranks in one
        joined = is_causal or hasattr(self.inner, "share_statistics")
        parts = [HeadsPart(self.inner, self.group, self.output, piece, (q, k, v), counts, options, out, joined, runtime)
                 for piece in head_pieces(heads, self.group.size, tiles, runtime.processors(q), runtime.NAME)]
        lses = computed(parts, found, counts, self.group, self.inner, options, runtime, is_causal, return_lse)
        for part in parts:
            part.rows.place(out)
        return (out, runtime.contiguous(runtime.concat(lses, 1))) if return_lse else out
