"""The metrics there are: every file of this folder but this one is one, and carries all that is to be known of it.

A file says NAME (in results and commands), LABEL (in reports), UNIT, DIGITS (decimals), HIGHER_IS_BETTER (None: neither is)
and KIND, which is what `measure` looks at:

    "paired"  measure(video, reference, context)   a video and its exact twin
    "alone"   measure(video, reference, context)   one video; it has no use for the reference
    "set"     measure(features, exact features)    all videos of a run; features(video, context) is kept of each
    "tensor"  measure(output, reference)           an attention output and the exact one

`measure` gives the figure. Of one video it may also be {part: figure}, a part "all" stands for the whole; or None, where
there is nothing to say. A file may say as well:

    PERFECT            the figure of two that are identical; what a paired figure lost is the distance to it
    loss(figure)       what is lost, where it is another function of the figure
    per_frame(video, reference, context)   in place of `measure`: figures [F], kept as a curve; the figure is their mean
    PLACE              where it stands in tables, from low to high; without one it stands last
    REDUCE             how its values over steps or heads become one; otherwise their mean
    NEEDS              packages that must be there; missing(weights) says why it cannot run otherwise

A new metric is a new file and nothing else.
"""
from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import ModuleType

import numpy as np

from lowbit_video.installing import pip_install

from .shared.context import absent

KINDS = ("paired", "alone", "set", "tensor")


@dataclass(frozen=True)
class Metric:
    """One metric: what its file says, under the same names, and the file's module for its functions."""

    module: ModuleType
    name: str
    label: str
    unit: str
    digits: int
    higher_is_better: bool | None
    kind: str
    perfect: float | None = None
    place: float = math.inf
    reduce: Callable[..., np.ndarray] = np.mean
    needs: tuple[str, ...] = ()

    @property
    def direction(self) -> str:
        """Which way is better, in words."""
        return {None: "compare only", True: "higher is better", False: "lower is better"}[self.higher_is_better]

    def missing(self, weights: Mapping[str, str]) -> str | None:
        """Why it cannot run here, or None."""
        if lacking := absent(self.needs):
            return f"needs the package{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}: {pip_install('eval')}"
        check = getattr(self.module, "missing", None)
        return check(weights) if check else None

    def loss(self, value: float, exact: float | None) -> float:
        """How far a figure is from what the exact run gives: from a perfect pair, or from the exact video's own figure."""
        if self.kind != "paired":
            return abs(value - exact)
        own = getattr(self.module, "loss", None)
        return float(own(value)) if own else abs(value - self.perfect)


def read(module: ModuleType) -> Metric:
    """The metric of a file."""
    named = {field.name: field.name.upper() for field in fields(Metric) if field.name != "module"}
    must = {field.name for field in fields(Metric) if field.default is MISSING}
    found = Metric(module, **{name: getattr(module, there) for name, there in named.items()
                              if name in must or hasattr(module, there)})
    assert found.kind in KINDS, module
    return found


@functools.cache
def metrics() -> dict[str, Metric]:
    """Every metric by name, in the order of the files' names."""
    files = sorted(file.name for file in pkgutil.iter_modules(sys.modules[__package__].__path__) if not file.ispkg)
    found = [read(importlib.import_module(f".{name}", __package__)) for name in files if name != "registry"]
    return {metric.name: metric for metric in found}


def metric(name: str) -> Metric:
    """The metric a figure's name belongs to; "adherence.colour" belongs to "adherence".

    Raises:
        ValueError: no such metric (lists what exists).
    """
    known = metrics()
    if name.partition(".")[0] not in known:
        raise ValueError(f"no metric {name!r}; there are: {', '.join(sorted(known))}")
    return known[name.partition(".")[0]]


def of_kind(kind: str) -> list[Metric]:
    """The metrics of a kind in the order of tables."""
    return sorted((m for m in metrics().values() if m.kind == kind), key=lambda m: (m.place, m.name))


def choose(names: Iterable[str] | None, weights: Mapping[str, str]) -> tuple[list[Metric], dict[str, str]]:
    """The video metrics to run, and why the others cannot.

    Args:
        names: the metrics asked for, or None for all that can run here.
        weights: name -> path, as the user gave them.

    Returns:
        (metrics that run, {name: what it lacks}).

    Raises:
        ValueError: an unknown name; or a metric asked for by name that cannot run (says what is missing).
    """
    wanted = [metric(name) for name in names] if names else [m for m in metrics().values() if m.kind != "tensor"]
    lacking = {m.name: reason for m in wanted if (reason := m.missing(weights))}
    if names and lacking:
        raise ValueError("; ".join(f"{name} {reason}" for name, reason in lacking.items()))
    return [m for m in wanted if m.name not in lacking], lacking
