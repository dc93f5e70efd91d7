"""Video pipelines in PaddlePaddle; names are imported when used, so that this alone needs no Paddle."""
from __future__ import annotations

from .cogvideox import __all__, __getattr__  # noqa: F401
