"""Video pipelines in PaddlePaddle; names are imported when used, so that this alone needs no Paddle."""
from __future__ import annotations

from typing import Any

from . import cogvideox

__all__ = sorted([*cogvideox.__all__, "load"])


def __getattr__(name: str) -> Any:
    if name == "load":
        from .loading import load

        return load
    return getattr(cogvideox, name)
