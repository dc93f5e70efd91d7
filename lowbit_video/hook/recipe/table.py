"""A recipe on a model: of each layer, which rung each head has in which steps."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...arguments import some_of
from .rule import Rule, heads_text, steps_text


@dataclass(frozen=True)
class Span:
    """Steps of one layer that are alike.

    start, end: shares of the denoising; a step that begins at `end` is the next span's. rungs: one a query head.
    """

    start: float
    end: float
    rungs: tuple[str, ...]

    def groups(self) -> dict[str, tuple[int, ...]]:
        """The heads of each rung, in ascending order."""
        return {rung: tuple(head for head, one in enumerate(self.rungs) if one == rung) for rung in dict.fromkeys(self.rungs)}


@dataclass(frozen=True)
class LayerPlan:
    """What one layer runs: spans that follow each other from 0 to 1. Layers that are alike have equal plans."""

    spans: tuple[Span, ...]

    @property
    def heads(self) -> int:
        """Query heads of the layer."""
        return len(self.spans[0].rungs)

    def at(self, share: float) -> Span:
        """The span of a step. share: of the denoising that is done before it, 0 to 1."""
        return next((span for span in self.spans if span.start <= share < span.end), self.spans[-1])

    def now(self, clock: Any) -> Span:
        """The span of the step that a clock says (`StepClock`), which is asked only where there are several."""
        return self.spans[0] if len(self.spans) == 1 else self.at(clock.share())


@dataclass(frozen=True)
class Table:
    """What a recipe gives each layer of a model: plans by the names of attention modules. `str()` is a table."""

    layers: Mapping[str, LayerPlan]

    @property
    def has_steps(self) -> bool:
        """Whether some layer is not alike in all steps."""
        return any(len(plan.spans) > 1 for plan in self.layers.values())

    def cells(self) -> Iterator[tuple[str, int, float, float, str]]:
        """(layer, head, start, end, rung) of every cell."""
        for name, plan in self.layers.items():
            for span in plan.spans:
                for head, rung in enumerate(span.rungs):
                    yield name, head, span.start, span.end, rung

    def shares(self) -> dict[str, float]:
        """What part of all layers, heads and steps has each rung, the largest first; they sum to 1."""
        total: dict[str, float] = {}
        heads = sum(plan.heads for plan in self.layers.values())
        for _, _, start, end, rung in self.cells():
            total[rung] = total.get(rung, 0.0) + (end - start) / heads
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        lines = []
        for name, plan in self.layers.items():
            for span in plan.spans:
                groups = span.groups()
                what = ", ".join(rung if len(groups) == 1 else f"{rung} (heads {heads_text(heads)})"
                                 for rung, heads in groups.items())
                lines.append(f"{name}  steps {steps_text(span.start, span.end)}  {what}")
        return "\n".join(lines)


def table_of(rules: Sequence[Rule], heads: Mapping[str, int], source: str) -> Table:
    """The rules on a model: the last rule that meets a cell gives its rung.

    heads: query heads by layer. source: how errors name the recipe.
    Raises ValueError for a rule that names no layer or heads that a layer has not, and for a cell that no rule meets.
    """
    for number, rule in enumerate(rules, 1):
        name = f"{source}, rule {number}"
        met = [layer for layer in heads if rule.matches(layer)]
        if not met:
            raise ValueError(f"{name}: layers {', '.join(map(repr, rule.layers))} names no attention module; there are: "
                             f"{some_of(list(heads))}")
        for layer in met:
            if rule.heads is not None and rule.heads[-1] >= heads[layer]:
                raise ValueError(f"{name}: heads {heads_text(rule.heads)} are asked of {layer}, which has {heads[layer]} (0 to "
                                 f"{heads[layer] - 1})")
    return Table({layer: _plan(layer, count, [rule for rule in rules if rule.matches(layer)], source)
                  for layer, count in heads.items()})


def _plan(layer: str, heads: int, rules: Sequence[Rule], source: str) -> LayerPlan:
    edges = sorted({0.0, 1.0, *(edge for rule in rules for edge in rule.steps)})
    spans: list[Span] = []
    for start, end in zip(edges, edges[1:]):
        rungs: list[str | None] = [None] * heads
        for rule in rules:
            if rule.steps[0] <= start and end <= rule.steps[1]:
                for head in range(heads) if rule.heads is None else rule.heads:
                    rungs[head] = rule.rung
        if None in rungs:
            bare = heads_text(head for head, rung in enumerate(rungs) if rung is None)
            raise ValueError(f"{source}: no rule says what {layer} runs with heads {bare} in steps {steps_text(start, end)}; "
                             "begin it with a rule for all, which has a rung and nothing else")
        if spans and spans[-1].rungs == tuple(rungs):
            spans[-1] = Span(spans[-1].start, end, spans[-1].rungs)
        else:
            spans.append(Span(start, end, tuple(rungs)))
    return LayerPlan(tuple(spans))
