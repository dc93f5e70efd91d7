"""`ring()`: each rank keeps its queries; keys and values go round, one part computed while the next is under way.

Partial results are merged by their log-sum-exp. Where the attention has codes, the codes of K and V travel, made once with
the mean of all keys. Codes are small, so those of all keys come together where they can be joined, and are attended at once
(`keys_part`); else they go round, and as every part's scores are smoothed alike, they merge as they are.
Source: Ring Attention (arXiv 2310.01889); point to point, never all of K and V at once.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowbit_video.kernels.exchange.layout import layout_of

from ..engine import codes as engine
from ..engine.checks import check_finite, refuse_gradients
from ..engine.codes import AttentionCodes, Codes
from ..engine.options import AttentionOptions
from ..errors import UnsupportedError
from ..hook.attend import Attend, coded
from ..runtime.detect import runtime_of
from ..runtime.protocol import Runtime
from .exchange import check_exchange, on_the_wire
from .group import ITEM_SIZES, Group, as_bytes, part_of
from .keys_part import KeysPart, can_gather
from .pieces import gathered_waves, head_pieces, rows_in_tiles
from .statistics import computed, shared_statistics, token_counts


def ring(attend: Attend, group: Group, exchange: str = "auto", shares: Sequence[int] | None = None,
         kv_shares: Sequence[int] | None = None) -> Attend:
    """Attention of tokens that the ranks of a group share, by sending K and V round.

    attend: what computes one part of the keys; must give an LSE. The rest as `ulysses`; any shares can be codes here.
    is_causal: only where Q's shares are K's; parts that no query of this rank sees are passed on and not computed.
    Raises as `ulysses`.
    """
    check_exchange(exchange, "16bit")
    return Ring(attend, group, exchange, shares, kv_shares)


class Ring:
    """See `ring`."""

    def __init__(self, attend: Attend, group: Group, exchange: str, shares: Sequence[int] | None,
                 kv_shares: Sequence[int] | None) -> None:
        self.attend, self.group, self.exchange = attend, group, exchange
        self.shares, self.kv_shares = shares, shares if kv_shares is None else kv_shares
        self.inner = coded(attend)
        if self.inner is None:
            self.of_codes = None

    def __call__(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None, return_lse: bool = False
                 ) -> Any:
        if self.group.size == 1:
            return self.attend(q, k, v, is_causal, scale, return_lse)
        if self.pools:
            raise UnsupportedError("which keys are pooled is chosen among all of them, and a ring has a share at a time\n"
                                   "share heads instead (ulysses), or attend without pooled keys")
        runtime = runtime_of(q)
        refuse_gradients(runtime, q, k, v)
        counts = self._counts(runtime.shape(q)[1], runtime.shape(k)[1], q, runtime)
        options = self._options(q, k, v, counts, is_causal, scale, return_lse, runtime)
        if options is None:
            return self._by_values(q, k, v, counts, is_causal, scale, return_lse, runtime)
        batch, _, heads, _ = runtime.shape(k)
        gathers = not is_causal and can_gather(engine.kind_of(q, options, runtime), batch, heads, counts[1], self.inner,
                                                self.group)
        out, lse = (self._gathered(q, k, v, counts, options, runtime) if gathers else
                    self._by_codes(q, k, v, counts, options, is_causal, runtime))
        return (out, lse) if return_lse else out

    def _gathered(self, q, k, v, counts, options: AttentionOptions, runtime: Runtime) -> tuple[Any, Any]:
        """(out, lse or None) by codes of all keys that come together, a piece of the heads after the other."""
        batch, tokens, heads, head_dim = runtime.shape(q)
        found = engine.statistics(q, k, v, options, runtime)
        out = runtime.empty((batch, tokens, heads, head_dim), runtime.dtype_name(q), q)
        parts = [KeysPart(self.inner, self.group, piece, (q, k, v), counts[1], options, out, runtime)
                 for piece in head_pieces(heads, 1, rows_in_tiles(batch, max(counts[0]), head_dim), runtime.processors(q),
                                          runtime.NAME, gathered_waves(batch, self.group.size))]
        lses = computed(parts, found, counts, self.group, self.inner, options, runtime, options.return_lse)
        return out, runtime.contiguous(runtime.concat(lses, 1)) if options.return_lse else None

    def _by_codes(self, q, k, v, counts, options: AttentionOptions, is_causal: bool, runtime: Runtime) -> tuple[Any, Any]:
        """(out, lse) by codes of keys that go round."""
        found = engine.statistics(q, k, v, options, runtime)
        if found is not None:
            found = shared_statistics(found, counts, self.group, self.inner, options, runtime)
        batch, tokens, heads, _ = runtime.shape(q)
        kind = engine.kind_of(q, options, runtime)
        q_layout, kv_layout = layout_of(kind, batch, heads, tokens, 0), layout_of(kind, batch, heads, 0, runtime.shape(k)[1])
        keys = Codes(engine.encode((q, k, v), found, kv_layout, options, runtime), kv_layout)
        scale = engine.v_scale_of(found, options)

        def quantise_q() -> AttentionCodes:
            queries = Codes(engine.encode((q, k, v), found, q_layout, options, runtime), q_layout)
            return AttentionCodes(queries, keys, scale, options, runtime.dtype_name(q))

        return self._round(keys, quantise_q, counts, is_causal, options.return_lse, False, runtime)

    @property
    def pools(self) -> bool:
        """Whether the attention within pools keys."""
        return getattr(self.inner, "pools", False)

    def options(self, is_causal: bool, scale: float | None, return_lse: bool) -> AttentionOptions:
        """The choices of a call, of the attention within."""
        return self.inner.options(is_causal, scale, return_lse)

    def of_codes(self, codes: AttentionCodes, is_causal: bool = False, return_lse: bool = False, smoothed_lse: bool = False,
                 tokens_first: bool = True) -> tuple[Any, Any]:
        """(out, lse) of this rank's queries and all keys, from codes of this rank's share of both."""
        runtime = runtime_of(codes.q.memory)
        if self.group.size == 1:
            return self.inner.of_codes(codes, is_causal, return_lse, smoothed_lse, tokens_first)
        counts = self._counts(codes.q.layout.q_len, codes.kv.layout.kv_len, codes.q.memory, runtime)
        return self._round(codes.kv, lambda: codes, counts, is_causal, return_lse and not smoothed_lse, tokens_first, runtime)

    def share_statistics(self, found: Any, q_count: int, kv_count: int, options: AttentionOptions, runtime: Runtime) -> Any:
        """Statistics of all tokens of this group, from those of this rank's."""
        counts = self._counts(q_count, kv_count, found, runtime)
        return shared_statistics(found, counts, self.group, self.inner, options, runtime)

    def _counts(self, q_count: int, kv_count: int, like: Any, runtime: Runtime) -> tuple[list[int], list[int]]:
        return token_counts((q_count, kv_count), like, self.shares, self.kv_shares, self.group, runtime)

    def _options(self, q, k, v, counts, is_causal, scale, return_lse, runtime: Runtime) -> AttentionOptions | None:
        """The choices of a call by codes, its scale a number; None where values must travel as they are."""
        if self.exchange == "16bit" or self.inner is None:
            return None
        options = on_the_wire(self.inner.options(is_causal, scale, return_lse), self.exchange)
        try:
            reason = engine.why_no_codes(q, k, v, replace(options, return_lse=True), runtime, sum(counts[0]), sum(counts[1]))
        except (UnsupportedError, TypeError):
            return None  # the attention itself will say so, or fall back
        if reason is not None:
            self.group.traffic.note(f"in 16 bits: {reason}")
            return None
        check_finite(options, runtime, q=q, k=k, v=v)
        return options.scaled(runtime.shape(q)[-1])

    def _round(self, keys: Codes, queries: Callable[[], AttentionCodes], counts, is_causal: bool, whole_lse: bool,
               tokens_first: bool, runtime: Runtime) -> tuple[Any, Any]:
        """(out, lse) as the codes of K and V come round.

        keys: this rank's, which leave at once. queries: makes the codes of both while they travel. whole_lse: with what
        smoothing took from it.
        """
        layout, memory = keys.layout, keys.memory
        if keys.begin:
            memory = runtime.contiguous(memory[keys.begin:])
        layouts = [layout_of(layout.kind, layout.batch, layout.heads, 0, count, layout.heads_first) for count in counts[1]]
        values = [2 * 2 * layout.batch * layout.heads * layout.kind.head_dim * count for count in counts[1]]
        codes: list[AttentionCodes] = []

        def attend(memory: Any, source: int, causal: bool) -> tuple[Any, Any]:
            part = replace(codes[0], kv=Codes(memory, layouts[source]))
            return self.inner.of_codes(part, causal, True, not whole_lse, tokens_first)

        sizes = [one.size for one in layouts]
        return self._merge_all(memory, sizes, values, counts, attend, is_causal, tokens_first, runtime,
                               meanwhile=lambda: codes.append(queries()))

    def _by_values(self, q, k, v, counts, is_causal, scale, return_lse, runtime: Runtime) -> Any:
        batch, _, heads, head_dim = runtime.shape(k)
        dtype = runtime.dtype_name(k)
        elements = [batch * heads * head_dim * count for count in counts[1]]
        sizes = [2 * count * ITEM_SIZES[dtype] for count in elements]
        memory = runtime.concat([as_bytes(runtime.contiguous(x), runtime) for x in (k, v)], 0)

        def attend(memory: Any, source: int, causal: bool) -> tuple[Any, Any]:
            shape = (batch, counts[1][source], heads, head_dim)
            keys, values = (part_of(memory, begin, dtype, shape, runtime) for begin in (0, sizes[source] // 2))
            out, lse = self.attend(q, keys, values, causal, scale, True)
            return runtime.contiguous(out), lse

        in_16_bit = [2 * 2 * count for count in elements]
        out, lse = self._merge_all(memory, sizes, in_16_bit, counts, attend, is_causal, False, runtime)
        return (out, lse) if return_lse else out

    def _merge_all(self, memory: Any, sizes: list[int], in_16_bit: list[int], counts, attend: Callable[..., tuple[Any, Any]],
                   is_causal: bool, tokens_first: bool, runtime: Runtime, meanwhile: Callable[[], None] | None = None
                   ) -> tuple[Any, Any]:
        """(out, lse) of this rank's queries over all parts of the keys, as they come round.

        memory: this rank's part, uint8 [bytes]. sizes, in_16_bit: bytes of each rank's part, and as 16-bit values. attend:
        `attend(memory, source, causal)` of one part. meanwhile: to do once the first part has left.
        A part leaves before the merge of what was computed so far: on a GPU a transfer needs a little room to begin, and would
        get none before the end of an attention that is launched with it.
        """
        if is_causal and counts[0] != counts[1]:
            raise UnsupportedError(f"a causal ring needs keys shared as the queries are; given: queries {counts[0]}, keys "
                                   f"{counts[1]}; use ulysses, which serves any")
        size, rank = self.group.size, self.group.rank
        following, before = (rank + 1) % size, (rank - 1) % size
        sources = [(rank - step) % size for step in range(size)]
        last = max(step for step, source in enumerate(sources) if not (is_causal and source > rank))
        whole: tuple[Any, Any] | None = None
        part: tuple[Any, Any] | None = None
        dtype = None
        for step, source in enumerate(sources):
            work = None
            if step + 1 < size:
                arriving = runtime.empty((sizes[sources[step + 1]],), "uint8", memory)
                sent_bytes, received_bytes = [0] * size, [0] * size
                sent_bytes[following], received_bytes[before] = sizes[source], sizes[sources[step + 1]]
                work = self.group.exchange(memory, sent_bytes, arriving, received_bytes, "ring", in_16_bit=in_16_bit[source])
            if step == 0 and meanwhile is not None:
                meanwhile()
            whole, part = self._merged(whole, part, runtime, tokens_first, "float32"), None
            if not (is_causal and source > rank):
                part = attend(memory, source, is_causal and source == rank)
                dtype = dtype or runtime.dtype_name(part[0])
            if step == last:
                whole, part = self._merged(whole, part, runtime, tokens_first, dtype), None
            if work is not None:
                work.wait()
                memory = arriving
        return whole

    @staticmethod
    def _merged(whole: tuple[Any, Any] | None, part: tuple[Any, Any] | None, runtime: Runtime, tokens_first: bool, dtype: str
                ) -> tuple[Any, Any] | None:
        """(out, lse) of what was merged so far and a part more."""
        if whole is None or part is None:
            return part or whole
        return engine.merge(*whole, *part, runtime, tokens_first=tokens_first, dtype=dtype)
