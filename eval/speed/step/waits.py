"""What makes a Paddle step wait for the device: tensors read on the host, and operators that Paddle runs on the CPU."""
from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import paddle

READS = ("numpy", "item", "tolist", "cpu")
"""Methods of a tensor that copy it to the host. float(), int(), bool() and np.asarray() call the first."""
CHOOSES = "kernel_factory"
"""The file of Paddle's C++ that chooses kernels."""
FALLBACK = re.compile(r"missing \S+ kernel: (\w+),.*fallback")
"""What Paddle logs of an operator that a device lacks. Source: its paddle/phi/core/kernel_factory.cc."""


def reads_of(step: Callable[[], Any]) -> dict[str, int]:
    """How often a step reads a tensor on the host, by method; "to_tensor": how often it makes one of the host's values."""
    counts: Counter[str] = Counter()

    def counted(name: str, own: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return own(*given, **named)

        return call

    with contextlib.ExitStack() as undo:
        for name in READS:
            undo.enter_context(mock.patch.object(paddle.Tensor, name, counted(name, getattr(paddle.Tensor, name))))
        undo.enter_context(mock.patch.object(paddle, "to_tensor", counted("to_tensor", paddle.to_tensor)))
        step()
    return dict(counts)


def fallbacks_of(step: Callable[[], Any]) -> dict[str, int] | None:
    """How often a step runs an operator on the CPU for the lack of the device's own, by operator.

    None where Paddle does not tell: that it does is tried with random numbers, which the device here has not.
    """
    if not FALLBACK.search(logged(lambda: paddle.randn([2]))):
        return None
    return dict(Counter(FALLBACK.findall(logged(step))))


def prepare(file: str = CHOOSES) -> None:
    """Call before Paddle computes anything: a line that has once decided not to log asks for its file's level no more."""
    paddle.base.core.set_vlog_level({file: 0})


def logged(call: Callable[[], Any], file: str = CHOOSES) -> str:
    """What a file of Paddle's C++ logs during a call."""
    with tempfile.TemporaryFile() as caught:
        own = os.dup(2)
        os.dup2(caught.fileno(), 2)
        paddle.base.core.set_vlog_level({file: 3})
        try:
            call()
        finally:
            paddle.base.core.set_vlog_level({file: 0})
            os.dup2(own, 2)
            os.close(own)
        caught.seek(0)
        return caught.read().decode(errors="replace")
