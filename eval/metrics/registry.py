"""The metrics there are: every module of this folder that names itself (NAME, UNIT, HIGHER_IS_BETTER, KIND) is one.

KIND says what a metric looks at: "paired" a video and its exact twin, "alone" one video, "set" all videos of a
precision, "tensor" an attention output and the exact one. A new metric is a new file and nothing else.
"""
from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .shared.context import absent

KINDS = ("paired", "alone", "set", "tensor")


@dataclass(frozen=True)
class Metric:
    """One metric: what its file declares, and its module for the figure itself.

    perfect: the value of two identical videos, where there is one; the distance to it is the metric's loss.
    """

    name: str
    unit: str
    higher_is_better: bool | None
    kind: str
    perfect: float | None
    module: ModuleType

    def missing(self, weights: Mapping[str, str]) -> str | None:
        """Why it cannot run here, or None."""
        if lacking := absent(getattr(self.module, "NEEDS", ())):
            return f"needs the package{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}: pip install 'lowbit-video[eval]'"
        check = getattr(self.module, "missing", None)
        return check(weights) if check else None


@functools.cache
def metrics() -> dict[str, Metric]:
    """Every metric by name; files that declare no NAME are not imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        names = {t.id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign) for t in node.targets
                 if isinstance(t, ast.Name)}
        if {"NAME", "UNIT", "HIGHER_IS_BETTER", "KIND"} <= names:
            module = importlib.import_module(f".{path.stem}", __package__)
            assert module.KIND in KINDS, path
            perfect = getattr(module, "PERFECT", None)
            found[module.NAME] = Metric(module.NAME, module.UNIT, module.HIGHER_IS_BETTER, module.KIND, perfect, module)
    return found


def metric(name: str) -> Metric:
    """The metric a figure's name belongs to; "adherence.colour" belongs to "adherence".

    Raises:
        ValueError: no such metric (lists what exists).
    """
    known = metrics()
    if name.partition(".")[0] not in known:
        raise ValueError(f"no metric {name!r}; there are: {', '.join(sorted(known))}")
    return known[name.partition(".")[0]]


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
