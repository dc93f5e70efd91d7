"""Every launch of a Triton kernel passes through `launch`, so that a caller may record what a call launches.

Triton binds, specialises and looks up every argument of every launch anew, most of the host's part of a short
call. A recorded launch has all that behind it: the compiled kernel, the grid, the arguments in their order.
"""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

_STATE = threading.local()


class Launch(NamedTuple):
    """compiled: what Triton launched (None under its interpreter); arguments: in the kernel's order, constants too."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants); constants: the rest of the kernel's parameters, and compiler options."""
    compiled = kernel[grid](*arguments, **constants)
    recording = getattr(_STATE, "recording", None)
    if recording is not None:
        rest = kernel.arg_names[len(arguments):] if compiled is not None else ()
        recording.append(Launch(compiled, grid, (*arguments, *(constants[name] for name in rest))))


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects this thread's launches inside the block."""
    before, _STATE.recording = getattr(_STATE, "recording", None), []
    try:
        yield _STATE.recording
    finally:
        _STATE.recording = before
