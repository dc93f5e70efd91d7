"""A rung as text: a precision, or a low-bit one with a share of the keys that is kept while the rest is pooled."""
from __future__ import annotations

import re
from typing import Any

from .arguments import shown
from .pooled import Pooled, as_pooled
from .precision import EXACT_SPECS, ROTATED, Precision, as_precision, precision_specs

_RUNG = re.compile(rf"(\S+(?:{ROTATED})?)(?: pooled (\d*\.?\d+)(?: always (\d{{1,9}}))?)?")


def parts_of_rung(rung: Any) -> tuple[str, Pooled | None]:
    """The precision of a rung, and how its keys are pooled. Raises ValueError for a rung that does not exist."""
    found = _RUNG.fullmatch(rung) if isinstance(rung, str) else None
    plain = found and found[1].removesuffix(ROTATED)
    if found is None or plain not in precision_specs() or (found[2] and plain in EXACT_SPECS):
        raise ValueError(f"there is no rung {shown(rung)}; there are: {', '.join(precision_specs())}; and low-bit ones with "
                         "pooled keys, such as 'int8+fp8 pooled 0.3' or 'int8+fp8 pooled 0.3 always 226'")
    if found[2] and found[1] != plain:
        raise ValueError(f"there is no rung {shown(rung)}: keys that are rotated are not pooled; leave out one of both")
    Precision(found[1])  # raises for exact attention that is rotated
    return found[1], Pooled(float(found[2]), int(found[3] or 0)) if found[2] else None


def pooled_rung(precision: str, keep: float, always: int = 0) -> str:
    """The text of a precision with a share of the keys kept, and its first `always` tokens."""
    return f"{precision} pooled {keep:g}" + (f" always {always}" if always else "")


def as_rung(given: Precision | str, pooled: Pooled | None = None) -> tuple[Precision, Pooled | None]:
    """The same of a Precision, or of a text as Precision takes it or with pooled keys; pooled: if the text does not say it.

    Raises ValueError for a text that is neither, or where both say how keys are pooled; TypeError for anything else.
    """
    if not isinstance(given, str) or " pooled" not in given:
        return as_precision(given), as_pooled(pooled)
    if pooled is not None:
        raise ValueError(f"precision {given!r} says how keys are pooled, and pooled={pooled} does too; give one of them")
    precision, pooled = parts_of_rung(given)
    return Precision(precision), pooled
