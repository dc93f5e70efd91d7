"""`Rule`: one line of a recipe: which layers, heads and steps, and the rung (the precision) that they get."""
from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...arguments import shown, whole
from ...precision import precision_specs
from ...rung import parts_of_rung

KEYS = ("layers", "heads", "steps", "rung")
STEP_DIGITS = 6
"""Decimals of a share of the denoising, in memory as in a file."""
_STEPS = re.compile(r"\s*(\d*\.?\d+)\s*-\s*(\d*\.?\d+)\s*")
_HEADS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")


@dataclass(frozen=True)
class Rule:
    """Which part of a model's attention gets a rung.

    rung: what `Precision` takes, such as "int8+fp8" or "exact"; or a low-bit one with a share of the keys that is kept while
        the rest is pooled (`Pooled`), "int8+fp8 pooled 0.3", and the tokens that always are, "int8+fp8 pooled 0.3 always 226".
    layers: patterns (`fnmatch`) of attention modules' names; a layer is meant if one of them fits. Default: all.
    heads: numbers of query heads, or a text such as "0-5" or "0-2,7". Default: all.
    steps: (from, to), shares of the denoising between 0, its first step, and 1; or a text such as "0.0-0.2". A step that begins
        at `to` is not meant, but where `to` is 1. Default: all.

    Raises ValueError for a rung that does not exist (lists those that do), for heads and steps that are none or out of order;
    TypeError for values of another kind.
    """

    rung: str
    layers: tuple[str, ...] = ("*",)
    heads: tuple[int, ...] | None = None
    steps: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        parts_of_rung(self.rung)
        object.__setattr__(self, "layers", _layers(self.layers))
        object.__setattr__(self, "heads", None if self.heads is None else _heads(self.heads))
        object.__setattr__(self, "steps", _steps(self.steps))

    def matches(self, layer: str) -> bool:
        """Whether a layer of that name is meant."""
        return any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """As a file has it; what is left to its default is left out."""
        values: dict[str, Any] = {}
        if self.layers != ("*",):
            values["layers"] = self.layers[0] if len(self.layers) == 1 else list(self.layers)
        if self.heads is not None:
            values["heads"] = heads_text(self.heads)
        if self.steps != (0.0, 1.0):
            values["steps"] = steps_text(*self.steps)
        return {**values, "rung": self.rung}


def as_rule(given: Rule | Mapping[str, Any]) -> Rule:
    """A rule from itself or from what a file has of it. Raises as Rule, and ValueError for a key that does not exist."""
    if isinstance(given, Rule):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"{shown(given)} is no rule; give a table with {', '.join(KEYS)}")
    unknown = [shown(key) for key in given if key not in KEYS]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}; there are: {', '.join(KEYS)}")
    if "rung" not in given:
        raise ValueError(f"it has no rung; give one of: {', '.join(precision_specs())}")
    return Rule(**given)


def runs_of(indices: Iterable[int]) -> list[slice]:
    """Indices in their order as slices of neighbours: (0, 1, 2, 7) is [0:3, 7:8]."""
    runs: list[slice] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = slice(runs[-1].start, index + 1)
        else:
            runs.append(slice(index, index + 1))
    return runs


def heads_text(heads: Iterable[int]) -> str:
    """Heads in ascending order as a text: (0, 1, 2, 7) is "0-2,7"."""
    runs = [(run.start, run.stop - 1) for run in runs_of(heads)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def steps_text(start: float, end: float) -> str:
    """A range of steps as a text: (0, 0.2) is "0-0.2"."""
    plain = lambda share: f"{share:.{STEP_DIGITS}f}".rstrip("0").rstrip(".")
    return f"{plain(start)}-{plain(end)}"


def _layers(given: Any) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise TypeError(f"layers is {shown(given)}; give a name pattern such as 'transformer_blocks.0.*', or a list of them")
    return tuple(patterns)


def _heads(given: Any) -> tuple[int, ...]:
    how = "give a list of numbers such as [0, 3], or a text such as '0-5' or '0-2,7'"
    if isinstance(given, str):
        parts = [_HEADS.fullmatch(part) for part in given.split(",")]
        if not all(parts):
            raise ValueError(f"heads is {shown(given)}; {how}")
        ranges = [(int(part[1]), int(part[2] or part[1])) for part in parts]
        if any(last < first for first, last in ranges):
            raise ValueError(f"heads is {shown(given)}, which counts backwards; {how}")
        given = [head for first, last in ranges for head in range(first, last + 1)]
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError(f"heads is {shown(given)}; {how}")
    return tuple(sorted({whole("heads", head, 0) for head in given}))


def _steps(given: Any) -> tuple[float, float]:
    how = "give shares of the denoising in order, from 0 to 1, such as '0.0-0.2'"
    if isinstance(given, str):
        found = _STEPS.fullmatch(given)
        if found is None:
            raise ValueError(f"steps is {shown(given)}; {how}")
        given = found.groups()
    elif not isinstance(given, (list, tuple)) or len(given) != 2 or not all(type(share) in (int, float) for share in given):
        raise TypeError(f"steps is {shown(given)}; {how}")
    start, end = (round(float(share), STEP_DIGITS) for share in given)
    if not 0 <= start < end <= 1:
        raise ValueError(f"steps is {steps_text(start, end)}; {how}")
    return start, end
