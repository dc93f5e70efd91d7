"""Which module owns another: modules of both frameworks know their children, and nobody knows a parent."""
from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

_owners: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def owner_of(module: Any) -> Any:
    """The live module of which `module` is a direct part, or None.

    One look at all live objects finds every module's owner, and is not repeated for those it found: a processor that was set
    by the model's own `set_attn_processor` never sees the model.
    """
    reference = _owners.get(module)
    if reference is None or reference() is None:
        _look()
        reference = _owners.get(module)
    return None if reference is None else reference()


def live_modules() -> Iterator[Any]:
    """All live modules, Paddle Layers and torch Modules."""
    kinds = (("paddle", "Layer"), ("torch", "Module"))
    classes = tuple(getattr(sys.modules[name].nn, kind) for name, kind in kinds if name in sys.modules)
    for candidate in gc.get_objects():
        if issubclass(type(candidate), classes):  # of its type: isinstance() would wake lazy objects
            yield candidate


def _look() -> None:
    for module in live_modules():
        children = getattr(module, "_sub_layers", None) or getattr(module, "_modules", None) or {}
        for child in list(children.values()):
            if child is not None:
                _owners[child] = weakref.ref(module)
