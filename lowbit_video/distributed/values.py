"""Values that travel as they are: shares of the tokens to shares of the heads, and back."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..hook.attend import Attend
from ..runtime.protocol import Runtime
from .group import ITEM_SIZES, Group, as_bytes, part_of, without
from .shares import even_shares


def by_heads(attend: Attend, group: Group, q: Any, k: Any, v: Any, counts: tuple[list[int], list[int]], choices: tuple,
             runtime: Runtime) -> Any:
    """Attention of shares of the tokens [B, N, H, D], computed by shares of the heads; K's heads are shared, Q's go with them.

    counts: tokens of Q, and of K and V, of each rank. choices: is_causal, scale, return_lse.
    """
    kv_heads = even_shares(runtime.shape(k)[2], group.size)
    q_heads = [count * (runtime.shape(q)[2] // runtime.shape(k)[2]) for count in kv_heads]
    travels = [Heads(x, heads, tokens, group, runtime)
               for x, heads, tokens in ((q, q_heads, counts[0]), (k, kv_heads, counts[1]), (v, kv_heads, counts[1]))]
    result = attend(*[one.joined() for one in travels], *choices)
    out, lse = result if choices[2] else (result, None)
    back = rows_of(runtime.contiguous(runtime.permute(out, (1, 0, 2, 3))), q_heads, counts[0], group, runtime)
    out = runtime.contiguous(runtime.permute(runtime.concat(back, 2), (1, 0, 2, 3)))
    return (out, rows_of_lse(lse, q_heads, counts[0], group, runtime)) if choices[2] else out


class Heads:
    """A tensor [B, this rank's tokens, H, D] under way to become [B, all tokens, this rank's heads, D]."""

    def __init__(self, x: Any, heads: Sequence[int], tokens: Sequence[int], group: Group, runtime: Runtime) -> None:
        batch, own, _, head_dim = runtime.shape(x)
        self.dtype, self.runtime, self.rank = runtime.dtype_name(x), runtime, group.rank
        size, first, mine = ITEM_SIZES[self.dtype], sum(heads[:group.rank]), heads[group.rank]
        by_heads = runtime.contiguous(runtime.permute(x, (2, 0, 1, 3)))  # any range of heads is one piece
        self.own, record = by_heads[first:first + mine], batch * own * head_dim * size
        self.sent = without(as_bytes(by_heads, runtime), first * record, (first + mine) * record, runtime)
        sent_bytes = [0 if place == self.rank else count * record for place, count in enumerate(heads)]
        self.shapes = [(mine, batch, count, head_dim) for count in tokens]
        self.sizes = [0 if place == self.rank else mine * batch * count * head_dim * size for place, count in enumerate(tokens)]
        self.received = runtime.empty((sum(self.sizes),), "uint8", x)
        self.work = group.exchange(self.sent, sent_bytes, self.received, self.sizes, "attention in",
                                   in_16_bit=sum(sent_bytes) // size * 2)

    def joined(self) -> Any:
        """All tokens [B, N, heads, D]."""
        self.work.wait()
        parts = [self.own if place == self.rank else
                 part_of(self.received, sum(self.sizes[:place]), self.dtype, shape, self.runtime)
                 for place, shape in enumerate(self.shapes)]
        return self.runtime.permute(self.runtime.concat(parts, 2), (1, 2, 0, 3))


def rows_of(x: Any, heads: Sequence[int], tokens: Sequence[int], group: Group, runtime: Runtime) -> list[Any]:
    """This rank's tokens of everyone's heads, by place, from everyone's tokens of this rank's heads.

    x: [N, B, own heads, ..], contiguous. Returns [own tokens, B, heads of a rank, ..] of each.
    """
    dtype, (_, batch, mine, *rest) = runtime.dtype_name(x), runtime.shape(x)
    rank, own, first = group.rank, tokens[group.rank], sum(tokens[:group.rank])
    item = batch * ITEM_SIZES[dtype]
    for length in rest:
        item *= length
    sizes = [0 if place == rank else own * count * item for place, count in enumerate(heads)]
    sent_bytes = [0 if place == rank else count * mine * item for place, count in enumerate(tokens)]
    received = runtime.empty((sum(sizes),), "uint8", x)
    sent = without(as_bytes(x, runtime), first * mine * item, (first + own) * mine * item, runtime)
    in_16_bit = sum(sent_bytes) // ITEM_SIZES[dtype] * 2
    group.exchange(sent, sent_bytes, received, sizes, "attention out", in_16_bit=in_16_bit).wait()
    return [x[first:first + own] if place == rank else
            part_of(received, sum(sizes[:place]), dtype, (own, batch, count, *rest), runtime)
            for place, count in enumerate(heads)]


def rows_of_lse(lse: Any, heads: Sequence[int], tokens: Sequence[int], group: Group, runtime: Runtime) -> Any:
    """float32 [B, H, own tokens] from [B, own heads, N]."""
    parts = rows_of(runtime.contiguous(runtime.permute(lse, (2, 0, 1))), heads, tokens, group, runtime)
    return runtime.contiguous(runtime.permute(runtime.concat(parts, 2), (1, 2, 0)))
