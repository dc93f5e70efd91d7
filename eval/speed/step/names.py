"""How a method's name says that its prologue is not fused."""
from __future__ import annotations

APART = " apart"
"""Behind a precision or a recipe: norms and positions are computed before attention, each in a pass of its own."""


def precision_of(method: str) -> str:
    """The precision or recipe of a method that may be followed by APART."""
    return method.removesuffix(APART)
