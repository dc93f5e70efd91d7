"""Which module a dispatched call comes from: hooks on attention modules say it, and a module's calls are counted in its record.

A dispatcher is handed tensors and never learns of modules. While a module is watched its forward hooks put the module's number
where the call finds it. The number is a tensor: a compiled graph takes it as an input, so blocks that share a graph still do.
After an error inside a watched module its number stays until the next one is called: torch's hooks that run after errors too
(`always_call`) are guarded one by one, and blocks would not share a graph.
"""
from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import torch

from ..report import Record

_numbers = itertools.count(1)
_watched: weakref.WeakValueDictionary[int, Watched] = weakref.WeakValueDictionary()


class _Calling(threading.local):
    number: torch.Tensor | None = None


_calling = _Calling()


def calling() -> torch.Tensor | None:
    """The number of the watched module that this thread is in, an int64 tensor [] on the CPU; None outside of such.

    None, not a number for it: a graph with a CPU tensor among its inputs takes no CUDA graph, so only what is watched pays.
    """
    return _calling.number


def watched_modules() -> list[torch.nn.Module]:
    """All modules that are watched now."""
    modules = [watched.module() for watched in _watched.values()]
    return [module for module in modules if module is not None and getattr(module, "attention_calls", None) is not None]


def caller_of(number: torch.Tensor | None) -> Watched | None:
    """What a module is watched by, by the module's number; None without one, and for a module that is watched no more."""
    return None if number is None else _watched.get(int(number))


class Watched:
    """A watched module's record and its hooks; the module keeps it as its `attention_calls`.

    before: the backend that the module's processor had of its own when watching began, or None. attention: what its recipe
    runs, or None.
    """

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self.record, self.before = Record(name), vars(module.processor).get("_attention_backend")
        self.module, self.attention = weakref.ref(module), None
        number = next(_numbers)
        _watched[number] = self
        self._hooks = [module.register_forward_pre_hook(_Say(torch.tensor(number))),
                       module.register_forward_hook(_Say(None))]
        module.attention_calls = self

    def end(self, module: torch.nn.Module) -> None:
        """The hooks come off, and the module forgets."""
        for hook in self._hooks:
            hook.remove()
        del module.attention_calls

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copied module is not watched


class _Say:
    """A forward hook that says which module is in its forward from here on."""

    def __init__(self, number: torch.Tensor | None) -> None:
        self.number = number

    def __call__(self, *what: Any) -> None:
        _calling.number = self.number

    def __reduce__(self) -> tuple:
        return _say_nothing, ()  # a copied module's hook does not count for the original


def _say_nothing() -> Any:
    return _ignore


def _ignore(*what: Any) -> None:
    return None
