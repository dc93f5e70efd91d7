"""A rung as text: a precision, or a low-bit one with a share of the keys that is kept while the rest is pooled."""
from __future__ import annotations

from typing import Any

from .pooled import Pooled, as_pooled
from .precision import POOLED, Precision, as_precision, split_rung


def parts_of_rung(rung: Any) -> tuple[str, Pooled | None]:
    """The precision of a rung, and how its keys are pooled. Raises ValueError for a rung that does not exist."""
    precision, pooling = split_rung(rung)
    Precision(precision)  # raises for exact attention that is rotated
    return precision, None if pooling is None else Pooled(*pooling)


def pooled_rung(precision: str, keep: float, always: int = 0) -> str:
    """The text of a precision with a share of the keys kept, and its first `always` tokens."""
    return f"{precision} pooled {keep:g}" + (f" always {always}" if always else "")


def as_rung(given: Precision | str, pooled: Pooled | None = None) -> tuple[Precision, Pooled | None]:
    """The same of a Precision, or of a text as Precision takes it or with pooled keys; pooled: if the text does not say it.

    Raises ValueError for a text that is neither, or where both say how keys are pooled; TypeError for anything else.
    """
    if not isinstance(given, str) or POOLED not in given:
        return as_precision(given), as_pooled(pooled)
    if pooled is not None:
        raise ValueError(f"precision {given!r} says how keys are pooled, and pooled={pooled} does too; give one of them")
    precision, pooled = parts_of_rung(given)
    return Precision(precision), pooled
