"""Which world's videos a model makes, as its folder says."""
from __future__ import annotations

from pathlib import Path

from lowbit_video.pipelines.shared.generation import read_generation

from .scene import WORLDS


def world_of(folder: str | Path) -> str | None:
    """The name in `WORLDS` that a model folder's generation.json gives; None for any other model, whose videos none can judge.

    Raises:
        ValueError: a generation.json that is none."""
    name = read_generation(folder).get("world")
    return name if name in WORLDS else None
