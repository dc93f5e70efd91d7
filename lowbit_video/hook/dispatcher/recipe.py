"""Recipes in models that ask diffusers' dispatcher: a backend that finds the rung of each call by the module it comes from."""
from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import UnsupportedError
from ...rung import as_rung
from ..processors import LowBitAttnProcessor
from ..recipe.clock import StepClock, clock_of
from ..recipe.processor import cut, groups_of, joined, take
from ..recipe.table import LayerPlan, Span
from . import registry
from .attention import DispatchedAttention
from .names import RECIPE
from .register import register_diffusers
from .watch import Watched

MISSING = "no backend of its own"


class RecipeAttention:
    """Dispatched attention of a module by its plan: each head at its rung of the step.

    plan: rungs by step and head. clock: says the step; asked only where the plan has several spans.
    hook: fallback, backend and check_finite, as in LowBitAttnProcessor; but the rung "exact" is diffusers' backend `native`,
    under any mask.
    Raises as LowBitAttnProcessor.
    """

    def __init__(self, plan: LayerPlan, clock: StepClock, hook: Mapping[str, Any]) -> None:
        LowBitAttnProcessor(**hook)  # which knows what does not exist
        self.plan, self.clock = plan, clock
        self._parts = {span: [_Part(*group, hook) for group in groups_of(plan, span)] for span in plan.spans}

    def serve(self, caller: Watched, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
              lengths: tuple[int, ...] | None, is_causal: bool, scale: float | None, return_lse: bool
              ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `DispatchedAttention.serve`.

        Raises UnsupportedError, naming the module, also outside of any step where a rule is for steps, and for heads that do
        not fit.
        """
        try:
            parts = self._parts[self.plan.now(self.clock)]
            if len(parts) == 1:
                return parts[0].serve(caller, q, k, v, mask, lengths, is_causal, scale, return_lse)
            cuts = [(part, *cut(part, part.heads, self.plan, q, k, v)) for part in parts]
        except UnsupportedError as error:
            raise UnsupportedError(_named(caller, error)) from error
        of_heads = lambda part: take(mask, 1, part.heads) if mask is not None and mask.ndim == 4 and mask.shape[1] > 1 else mask
        outs = [part.serve(caller, *own, of_heads(part), lengths, is_causal, scale, return_lse) for part, *own in cuts]
        heads = [part.heads for part in parts]
        lse = joined(heads, [lse for _, lse in outs], 1) if return_lse else None
        return joined(heads, [out for out, _ in outs], 2), lse

    def __str__(self) -> str:
        return f"recipe ({', '.join(dict.fromkeys(rung for span in self.plan.spans for rung in span.rungs))})"


class _Part(DispatchedAttention):
    """Some heads in some steps."""

    hint = "; apply with fallback='exact', or give this layer the rung exact"

    def __init__(self, rung: str, heads: tuple[int, ...], where: str, hook: Mapping[str, Any]) -> None:
        super().__init__(RECIPE, rung, **hook, where=where)
        self.rung, self.heads = rung, heads

    def __str__(self) -> str:
        return self.rung


def _named(caller: Watched, error: UnsupportedError) -> str:
    name = f"attention module {caller.record.name!r}: "
    return str(error) if name in str(error) else name + str(error)


class Placed:
    """A recipe's attention in one module; `take_back()` gives back what was there."""

    def __init__(self, module: torch.nn.Module, name: str, attention: RecipeAttention) -> None:
        self.module, self.name, self.attention = weakref.ref(module), name, attention
        self._own = vars(module.processor).get("_attention_backend", MISSING)
        watched = getattr(module, "attention_calls", None)
        self._watched = watched is not None
        watched = watched or Watched(module, name)
        self._under, watched.attention = watched.attention, attention
        module.processor._attention_backend = registry.dispatch_module(()).AttentionBackendName(RECIPE)

    def take_back(self) -> None:
        """The backend and the recipe of before; nothing where `unregister_diffusers` has taken them back."""
        module = self.module()
        watched = getattr(module, "attention_calls", None)
        if watched is None or watched.attention is not self.attention:
            return
        watched.attention = self._under
        if self._own == MISSING:
            del module.processor._attention_backend
        else:
            module.processor._attention_backend = self._own
        if not self._watched:
            watched.end(module)

    def copied(self, memo: dict) -> Placed | None:
        """The same in a copied model, whose modules have been copied; None where this module has not."""
        module = memo.get(id(self.module()))
        if module is None:
            return None
        twin = Placed(module, self.name, copy.deepcopy(self.attention, memo))
        twin._own = self._own  # the copied processor has the recipe's
        return twin


def plan_of(wanted: Any, heads: int) -> LayerPlan:
    """The plan of a module, itself or of one rung. Raises UnsupportedError for what no plan says, ValueError for no rung."""
    if isinstance(wanted, LayerPlan):
        return wanted
    if not isinstance(wanted, str):
        raise UnsupportedError(f"{type(wanted).__name__} in modules: a model that asks diffusers' dispatcher takes rungs by "
                               "their names there, such as 'int8+fp8', or None")
    as_rung(wanted)
    return LayerPlan((Span(0.0, 1.0, (wanted,) * heads),))


def place(model: Any, modules: Mapping[str, Any], choice: Mapping[str, Any], fused_prologue: bool | None, **hook: Any
          ) -> list[Placed]:
    """Puts recipes' attention into a model's modules. choice: plans, rungs or None by their names. hook: as `RecipeAttention`.

    Raises as `plan_of`, UnsupportedError for a fused prologue, and ImportError and UnsupportedError as `register_diffusers`;
    no module is changed then.
    """
    if fused_prologue:
        raise UnsupportedError(f"fused_prologue=True: {type(model).__name__} computes norms and positions before it asks "
                               "diffusers' dispatcher; leave it out")
    attentions = {}
    for name, wanted in choice.items():
        if wanted is not None:
            plan = plan_of(wanted, int(modules[name].heads))
            attentions[name] = RecipeAttention(plan, clock_of(model), hook)
    register_diffusers()
    return [Placed(modules[name], name, attention) for name, attention in attentions.items()]
