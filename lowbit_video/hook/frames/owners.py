"""Which module owns another: modules of both frameworks know their children, and nobody knows a parent."""
from __future__ import annotations

import gc
import sys
import weakref
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


def _look() -> None:
    kinds = [(sys.modules[name].nn, kind, children) for name, kind, children in
             (("paddle", "Layer", "_sub_layers"), ("torch", "Module", "_modules")) if name in sys.modules]
    classes = {getattr(nn, kind): children for nn, kind, children in kinds}
    for candidate in gc.get_objects():
        for module_class, children in classes.items():
            if issubclass(type(candidate), module_class):
                for child in list((getattr(candidate, children, None) or {}).values()):
                    if child is not None:
                        _owners[child] = weakref.ref(candidate)
