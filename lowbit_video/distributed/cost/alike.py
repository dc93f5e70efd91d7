"""What a recipe gives the layers of a model in each step, as far as it has a cost: steps that are alike, counted."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from ...hook.recipe.recipe import Recipe
from ...hook.recipe.rule import heads_text
from ...hook.recipe.table import Span, table_of
from ...rung import parts_of_rung
from .models import Model


class Alike(NamedTuple):
    """Steps that are alike: their share of all steps, and how many layers have each precision in them."""

    share: float
    layers: Mapping[str, int]


def alike_steps(recipe: Recipe, model: Model, steps: int) -> tuple[Alike, ...]:
    """The kinds of steps that a recipe makes of a denoising, in the order in which they first come.

    Raises ValueError as the recipe on such a model does, and for what has no measured cost: pooled keys, and heads of a layer
    at several rungs.
    """
    names = [f"transformer_blocks.{layer}.attn1" for layer in range(model.layers)]
    plans = table_of(recipe.rules, dict.fromkeys(names, model.heads), recipe.source).layers
    kinds: Counter[tuple[tuple[str, int], ...]] = Counter()
    for step in range(steps):
        layers = Counter(_precision(name, plan.at(step / steps), recipe.source) for name, plan in plans.items())
        kinds[tuple(sorted(layers.items()))] += 1
    return tuple(Alike(count / steps, dict(layers)) for layers, count in kinds.items())


def _precision(layer: str, span: Span, source: str) -> str:
    """The one precision of a layer in a step."""
    instead = "`bench parallel --recipe` times a step on the GPUs themselves"
    groups = span.groups()
    if len(groups) > 1:
        listed = ", ".join(f"{rung} to heads {heads_text(heads)}" for rung, heads in groups.items())
        raise ValueError(f"{source} gives {listed} of {layer}, whose cost is not measured; recipes with one rung a layer and "
                         f"step are planned, and {instead}")
    if parts_of_rung(span.rungs[0])[1] is not None:
        raise ValueError(f"{source} has {span.rungs[0]} in {layer}, and pooled keys on several GPUs are not measured; recipes "
                         f"of precisions with all keys are planned, and {instead}")
    return span.rungs[0]
