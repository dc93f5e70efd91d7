"""What was read of a mask, remembered: a model gives one mask to all its blocks, and to read it waits for a GPU."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

_known: dict[int, tuple[weakref.ref, int, dict[Hashable, Any]]] = {}
"""id of a mask -> itself, weakly, its version, and what was read of it."""


def read_once(mask: Any, what: Hashable, read: Callable[[], Any]) -> Any:
    """What `read()` returns, remembered under `what` as long as the mask lives and is not written to.

    A mask made under torch.inference_mode does not tell that it was written to: such a one is read at every call.
    """
    version, number = _version(mask), id(mask)
    if version is None:
        return read()
    reference, at, answers = _known.get(number, (None, None, {}))
    if reference is None or reference() is not mask or at != version:
        answers = {}
        _known[number] = weakref.ref(mask, lambda gone: _forget(number, gone)), version, answers
    if what not in answers:
        answers[what] = read()
    return answers[what]


def _version(mask: Any) -> int | None:
    """How often the mask was written to; None where it does not tell."""
    if hasattr(mask, "inplace_version"):
        return mask.inplace_version
    return None if mask.is_inference() else mask._version


def _forget(number: int, gone: weakref.ref) -> None:
    if number in _known and _known[number][0] is gone:  # another mask may have that id by now
        del _known[number]
