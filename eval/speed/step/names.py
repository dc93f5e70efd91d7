"""How a method's name says that its prologue is fused."""
from __future__ import annotations

FUSED = " fused"
"""Behind a precision or a recipe: norms and positions are computed in the same readings of q and k as quantisation."""


def unfused(method: str) -> str:
    """The precision or recipe of a method that may be followed by FUSED."""
    return method.removesuffix(FUSED)
