"""Prompt adherence in the small model's world: are the colour, shape, motion and background those of the caption?"""
from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping

from .video import as_uint8

NAME = "adherence"
UNIT = ""
HIGHER_IS_BETTER = True
KIND = "alone"


def missing(weights) -> str | None:
    """Why it cannot run, or None."""
    if importlib.util.find_spec(f"{__package__}.prompt_adherence") is None:
        return "needs eval/prompt_adherence.py, the scorer of the small model's world"
    return None


def measure(video, reference=None, context=None) -> dict[str, float] | None:
    """1 or 0 for each part, and for all of them together; None for a caption outside the scorer's world."""
    from . import prompt_adherence

    try:
        verdict = prompt_adherence.score(as_uint8(video), context.caption)
    except ValueError:
        return None
    if verdict is None:
        return None
    if dataclasses.is_dataclass(verdict):
        verdict = dataclasses.asdict(verdict)
    if not isinstance(verdict, Mapping):
        return {"all": float(verdict)}
    parts = {name: float(value) for name, value in verdict.items() if isinstance(value, (bool, int, float))}
    return {**parts, "all": min(parts.values())} if parts else None
