"""What an evaluation compares: a precision, a recipe, or anybody's processor named as "module:Class"."""
from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_video.hook.apply import apply
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.precision import names_recipe
from lowbit_video.rung import as_rung

from .floor import ReorderedExactProcessor

EXACT = "exact"
FLOOR = "floor"


@dataclass(frozen=True)
class Candidate:
    """One way to run a model's attention.

    label: how results name it. make: gives what `lowbit_video.apply` takes, fresh for every video:
    a precision, a recipe, a processor, or a dict of them by module name pattern.
    """

    label: str
    make: Callable[[], Any]

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^A-Za-z0-9+.-]+", "-", self.label)


def as_candidate(named: Any) -> Candidate:
    """Read a candidate.

    Args:
        named: a precision such as "int4+fp16", or with pooled keys "int8+fp8 pooled 0.3"; a recipe's file, which ends in .toml,
            or a preset's name; "module:Class" (made without arguments) or "module:function" (called, gives a processor); or a
            Candidate.

    Raises:
        ValueError: an unknown precision (lists what exists), a recipe that cannot be meant, the reserved names "exact" and
            "floor", a module or attribute that is not there, or something that cannot be called.
    """
    if isinstance(named, Candidate):
        return named
    text = str(named)
    if text in (EXACT, FLOOR):
        raise ValueError(f"{text!r} always runs, as the reference or its twin; name low-bit precisions or module:Class")
    if names_recipe(text):
        recipe = Recipe.load(text)
        return Candidate(text, lambda: recipe)
    if ":" not in text:
        as_rung(text)
        return Candidate(text, lambda: text)
    module, _, attribute = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # as `python -m` does: a processor of one's own lies where one works
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load the processor {text!r}: {error}; give module:Class, importable from {here}") from error
    if not callable(target):
        raise ValueError(f"{text!r} is a {type(target).__name__}; name a class or a function that makes a processor")
    return Candidate(text, target)


def applied(pipe, candidate: Candidate, *, backend: str = "auto", fallback: str | None = None):
    """Hook the candidate into the pipeline: the handle of `lowbit_video.apply`, a context manager."""
    wanted = candidate.make()
    if isinstance(wanted, dict):
        return apply(pipe, None, wanted, backend=backend, fallback=fallback)
    return apply(pipe, wanted, backend=backend, fallback=fallback)


def floor_candidate() -> Candidate:
    """The exact twin that differs from the exact run only in harmless ways."""
    return Candidate(FLOOR, ReorderedExactProcessor)
