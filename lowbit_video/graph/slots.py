"""Slots: what an attention module's processors find ready on it, so that a compiler can trace through them.

A graph holds one operator a module, with any batch, length, heads and head dim; the operator knows the module by its slot's
key, and runs the processor that the module has when it is reached. So a processor set after the compilation is the one that
runs, and calls are counted as in eager mode.
"""
from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import UnsupportedError
from ..runtime.detect import runtime_of
from .runners import register
from .tracing import paddle_ops, torch_ops

POSITIONAL = ("processor", "attn", "hidden_states", "encoder_hidden_states", "attention_mask")
"""What every frame takes; what it takes besides is given by name."""


class Slot:
    """One attention module's slot; the module owns it.

    runtime: of the module's tensors. frame: of the module's protocol (`hook/frames`). run: `run(module, q, k, v, mask=None)`,
    eagerly, by the processor that the module has then. operators, key: `torch_ops` or `paddle_ops`, whose functions stand for
    the attention in a graph that is being traced, which finds this slot by its key. around: None, or what is wrapped around the
    attention of whatever processor the module has (`Attend -> Attend`, as sequence parallel is). shared_by: None, or what makes
    that of diffusers' parallel config (`distributed/context_parallel.py`).
    """

    def __init__(self, attn: Any, like: Any, frame: Callable, run: Callable) -> None:
        self.runtime, self.frame = runtime_of(like), frame
        takes = list(inspect.signature(frame).parameters.values())[len(POSITIONAL):]
        self.names = tuple(p.name for p in takes if p.kind is not p.VAR_KEYWORD)
        self.any_name = len(self.names) < len(takes)
        self.around: Callable[[Any], Any] | None = None
        self.shared_by: Callable[[Any], Callable[[Any], Any]] | None = None
        self._module, self._run = weakref.ref(attn), run
        operators = paddle_ops() if self.runtime.NAME == "paddle" else torch_ops()
        self.operators, self.key = operators, operators.key_of(register(self))

    def check_names(self, names: Iterable[str]) -> None:
        """Raises UnsupportedError for arguments that the module's frame does not take; one that takes any looks for itself."""
        unknown = [name for name in names if name not in self.names]
        if unknown and not self.any_name:
            takes = ", ".join((*POSITIONAL[2:], *self.names))
            raise UnsupportedError(f"the attention was called with {', '.join(unknown)}, which {self.frame.__name__} does not "
                                   f"know; it takes {takes}; leave the argument out, or leave this module's own processor in "
                                   "its place (apply's modules={name: None})")

    def run(self, *tensors: Any, **asked: Any) -> Any:
        """The attention of [B, N, H, D] q, k, v, and a mask if there is one. asked: steps or apart, as the hook has them."""
        return self._run(self._module(), *tensors, **asked)

    def __reduce__(self) -> tuple:
        # A copied module must not answer to the original's key: its copy of the slot is None, and it makes its own.
        return type(None), ()
