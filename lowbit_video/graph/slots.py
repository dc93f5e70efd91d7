"""Slots: what an attention module's processors find ready on it, so that a compiler can trace through them.

A Paddle graph holds one `lowbit_attention` operator a module, with any batch, length, heads and head dim; the operator knows
the module by its slot's key, and runs the processor that the module has when it is reached. So a processor set after the
compilation is the one that runs, and calls are counted as in eager mode.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ..runtime.detect import runtime_of
from .runners import register


class Slot:
    """One attention module's slot; the module owns it.

    runtime: of the module's tensors. frame: of the module's protocol (`hook/frames`). run: `run(module, q, k, v, mask=None)`,
    eagerly, by the processor that the module has then. operator, masked_operator, key: with Paddle, the operators that stand
    for the attention in a static graph, and the key by which they find this slot. around: None, or what is wrapped around the
    attention of whatever processor the module has (`Attend -> Attend`, as sequence parallel is).
    """

    def __init__(self, attn: Any, like: Any, frame: Callable, run: Callable) -> None:
        self.runtime, self.frame = runtime_of(like), frame
        self.operator = self.masked_operator = self.key = None
        self.around: Callable[[Any], Any] | None = None
        if self.runtime.NAME == "paddle":
            from . import paddle_ops

            self._module, self._run = weakref.ref(attn), run
            self.key = register(self)
            self.operator, self.masked_operator = paddle_ops.module_op, paddle_ops.masked_module_op

    def run(self, *tensors: Any) -> Any:
        """The attention of [B, N, H, D] q, k, v, and a mask if there is one."""
        return self._run(self._module(), *tensors)

    def __reduce__(self) -> tuple:
        # A copied module must not answer to the original's key: its copy of the slot is None, and it makes its own.
        return type(None), ()
