"""What a caller gave for a number or a yes or no, as that kind; else an error that names the argument and what was given."""
from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

MAX_SHOWN = 80
"""Characters of a value in a message."""


def shown(value: Any) -> str:
    """The value as text for a message; one that would fill lines is named by its type."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN and "\n" not in text else f"a {type(value).__module__}.{type(value).__qualname__}"


def some_of(names: list[str], most: int = 6) -> str:
    """The first names of a list as text for a message, and how many there are where that is not all."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int. TypeError for what is no whole number, ValueError for one below `least` or above `most`."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        result = operator.index(value)
    except Exception:  # a tensor's own error has any type
        raise TypeError(f"{name} is {shown(value)}; give a whole number") from None
    if least is not None and result < least:
        raise ValueError(f"{name} is {shown(result)}; give at least {least}")
    if most is not None and result > most:
        raise ValueError(f"{name} is {shown(result)}; give at most {most}")
    return result


def number(name: str, value: Any) -> float:
    """The value, a number or an array or tensor of one, as a float. TypeError for what is none, ValueError for NaN and
    infinity."""
    try:
        if isinstance(value, (str, bytes, bool, np.bool_)):
            raise TypeError
        result = float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        result = math.inf
    except Exception:  # a tensor's own error has any type
        raise TypeError(f"{name} is {shown(value)}; give a finite number") from None
    if not math.isfinite(result):
        raise ValueError(f"{name} is {result}; give a finite number")
    return result


def flag(name: str, value: Any) -> bool:
    """The value as a bool; 0 and 1 are taken. TypeError for anything else: a text such as "no" would count as True."""
    if not isinstance(value, (bool, np.bool_, int)) or value not in (0, 1):
        raise TypeError(f"{name} is {shown(value)}; give True or False")
    return bool(value)
