"""`RecipeAttnProcessor`: each call runs the rung that the recipe has for its heads and its step."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...engine.codes import AttentionCodes
from ...engine.codes_target import Target
from ...engine.options import AttentionOptions
from ...errors import UnsupportedError
from ...runtime.detect import runtime_of
from ..base import AttnProcessor
from ..processors import LowBitAttnProcessor
from ..prologue import Before
from .clock import StepClock
from .rule import heads_text, runs_of, steps_text
from .table import LayerPlan, Span


class RecipeAttnProcessor(AttnProcessor):
    """Attention by a recipe; `apply(model, recipe)` makes one for layers that are alike.

    plan: rungs by step and head. clock: says the step; asked only where the plan has several spans.
    fallback, backend, check_finite, fused_prologue: as in LowBitAttnProcessor; rungs that fuse norms and positions may
    stand beside others, and the report tells which did.

    Where all heads have one rung, a call is that of LowBitAttnProcessor. Else the heads of each rung are computed together and
    put in their places: a copy of the output, and of q, k and v where a rung's heads do not lie side by side.
    """

    def __init__(self, plan: LayerPlan, clock: StepClock, *, fallback: str | None = None, backend: str = "auto",
                 check_finite: bool | None = None, fused_prologue: bool | None = None) -> None:
        super().__init__()
        self.plan, self.clock = plan, clock
        hook = {"fallback": fallback, "backend": backend, "check_finite": check_finite, "fused_prologue": fused_prologue}
        self._parts = {span: tuple(_Rung(*group, hook) for group in groups_of(plan, span)) for span in plan.spans}
        rungs = [part for parts in self._parts.values() for part in parts]
        self.low_bit, self.differentiable = any(rung.low_bit for rung in rungs), fallback == "exact"
        self.pools = any(rung.pools for rung in rungs)
        self.fused_prologue = rungs[0].fused_prologue
        reasons = [rung.always_apart for rung in rungs if rung.always_apart is not None]
        if len(reasons) == len(rungs):
            self.always_apart = self.apart_in_graphs = max(reasons, key=len)
        elif reasons:
            self.apart_in_graphs = "not all rungs of this layer fuse them, and a graph has one way"

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False, before: Before | None = None) -> Any:
        """Attention with each head at its rung of this step. before: what all heads of q and k still lack."""
        parts = self._now()
        if len(parts) == 1:
            return parts[0].attend(q, k, v, is_causal, scale, return_lse, before)
        outs = [part.attend(*cut(part, part.heads, self.plan, q, k, v), is_causal, scale, return_lse, before) for part in parts]
        heads = [part.heads for part in parts]
        if not return_lse:
            return joined(heads, outs, 2)
        return joined(heads, [out for out, _ in outs], 2), joined(heads, [lse for _, lse in outs], 1)

    def attend_masked(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """The same under a mask, which each rung takes or refuses."""
        parts = self._now()
        if len(parts) == 1:
            return parts[0].attend_masked(q, k, v, mask)
        by_head = len(mask.shape) == 4 and mask.shape[1] != 1
        return joined([part.heads for part in parts],
                      [part.attend_masked(*cut(part, part.heads, self.plan, q, k, v),
                                          take(mask, 1, part.heads) if by_head else mask) for part in parts], 2)

    def options(self, is_causal: bool = False, scale: float | None = None, return_lse: bool = False) -> AttentionOptions:
        """The choices of a call, whose heads have one rung. Raises UnsupportedError where they have several."""
        return self._only().options(is_causal, scale, return_lse)

    def of_codes(self, codes: AttentionCodes, is_causal: bool = False, return_lse: bool = False, smoothed_lse: bool = False,
                 tokens_first: bool = True, target: Target | None = None) -> tuple[Any, Any]:
        """As LowBitAttnProcessor's, where all heads have one rung. Raises UnsupportedError where they have several."""
        return self._only().of_codes(codes, is_causal, return_lse, smoothed_lse, tokens_first, target)

    def _now(self) -> tuple[_Rung, ...]:
        return self._parts[self.plan.now(self.clock)]

    def _only(self) -> _Rung:
        parts = self._now()
        if len(parts) > 1:
            raise UnsupportedError(f"the recipe gives this layer's heads several rungs ({', '.join(map(str, parts))}), and "
                                   "heads or keys that several ranks share have one; give the layer one rung in each step, or "
                                   "share guidance alone (cfg=2, ulysses=1, ring=1)")
        return parts[0]

    def __str__(self) -> str:
        rungs = dict.fromkeys(rung for span in self.plan.spans for rung in span.rungs)
        some = next(iter(self._parts.values()))[0]
        more = [f"fallback={some.fallback}"] if some.fallback else []
        if some.backend != "auto":
            more.append(f"backend={some.backend}")
        if some.fused_prologue is not None:
            more.append(f"fused_prologue={some.fused_prologue}")
        return f"{type(self).__name__}({', '.join((*rungs, *more))})"

    __repr__ = __str__


class _Rung(LowBitAttnProcessor):
    """Some heads in some steps; the report says which. where: in words, ""; where they are all."""

    def __init__(self, rung: str, heads: tuple[int, ...], where: str, hook: dict[str, Any]) -> None:
        super().__init__(rung, **hook)
        self.heads, self.where = heads, where

    def note(self, variant: str, reason: str = "", tiles: tuple[int, int] | None = None) -> None:
        """Count one call, with the steps and heads that it is of."""
        super().note(f"{self.where}{variant}", reason, tiles)

    def __str__(self) -> str:
        return self._what()


def groups_of(plan: LayerPlan, span: Span) -> list[tuple[str, tuple[int, ...], str]]:
    """(rung, its heads, which steps and heads it is of in words) of each rung of a span; ""; where they are all."""
    groups = span.groups()
    found = []
    for rung, heads in groups.items():
        words = ([f"steps {steps_text(span.start, span.end)}"] if len(plan.spans) > 1 else []) + \
            ([f"heads {heads_text(heads)}"] if len(groups) > 1 else [])
        found.append((rung, heads, f"{', '.join(words)}: " if words else ""))
    return found


def cut(rung: Any, own: tuple[int, ...], plan: LayerPlan, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """The heads `own`, which have a rung, of [B, N, H, D] tensors.

    Raises UnsupportedError where the call has other heads than the plan, or shares keys across rungs.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads != plan.heads:
        raise UnsupportedError(f"the call has {heads} heads, and the recipe was resolved for {plan.heads}")
    each = heads // kv_heads
    kv = tuple(dict.fromkeys(head // each for head in own))
    if len(kv) * each != len(own):
        raise UnsupportedError(f"{each} query heads share each of the {kv_heads} key heads, and the recipe gives {rung} to "
                               f"heads {heads_text(own)}: give those that share keys one rung, such as heads "
                               f"{heads_text(head * each + i for head in kv for i in range(each))}")
    return take(q, 2, own), take(k, 2, kv), take(v, 2, kv)


def take(t: Any, axis: int, indices: Sequence[int]) -> Any:
    """The tensor at some indices of a dimension; a view where they lie side by side.

    By slices: a list as an index gives wrong values of Paddle 3.3.1's tensors that are not contiguous.
    """
    cuts = [t[(slice(None),) * axis + (run,)] for run in runs_of(indices)]
    return cuts[0] if len(cuts) == 1 else runtime_of(t).concat(cuts, axis)


def joined(heads: Sequence[tuple[int, ...]], tensors: list[Any], axis: int) -> Any:
    """What rungs computed of their heads, head by head in the call's order."""
    order = [head for own in heads for head in own]
    whole = runtime_of(tensors[0]).concat(tensors, axis)
    return take(whole, axis, [order.index(head) for head in range(len(order))])
