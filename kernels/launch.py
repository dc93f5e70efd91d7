"""Every launch of a Triton kernel passes through `launch`, so that a caller may record what a call launches, and repeat it.

Triton binds, specialises and looks up every argument of every launch anew, most of the host's part of a short
call. A recorded launch has all that behind it: the compiled kernel, the grid, the arguments in their order. A backend that
launches otherwise gives `record` something with the same two methods, `replay` and `watched`.
"""
from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .compiled import driver_launch
from .driver_launch import Replay
from .shipped.choice import warn_of_speed

_STATE = threading.local()


class Launch(NamedTuple):
    """A launch by Triton.

    compiled: what Triton launched (None under its interpreter). arguments: in the kernel's order, constants too.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    def replay(self, driver: Any, numbers: Mapping[str, int]) -> Replay | str:
        """What launches it again by the CUDA driver; where it cannot be repeated, why, in words.

        driver: `runtime.cuda_driver`. numbers: the place of each origin's tensor among the addresses.
        """
        if self.compiled is None:
            return "Triton's interpreter ran it"
        found = driver_launch(self.compiled, self.grid, self.arguments)
        return f"{self.compiled.name}: {found}" if isinstance(found, str) else found.replay(driver, numbers)

    @staticmethod
    def watched() -> bool:
        """Whether a profiler hooked Triton's launches: then they go through Triton, which tells it."""
        hooks = sys.modules["triton"].knobs.runtime
        return any(getattr(hook, "calls", hook) for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants); constants: the rest of the kernel's parameters, and compiler options."""
    place = getattr(_STATE, "place", None)
    if place is not None and place.launch(kernel, grid, arguments, constants):
        return
    warn_of_speed()
    # fused multiply-adds are wanted, and are Triton's own default only until 3.10
    compiled = kernel[grid](*arguments, enable_fp_fusion=True, **constants)
    if getattr(_STATE, "recording", None) is not None:
        rest = kernel.arg_names[len(arguments):] if compiled is not None else ()
        record(Launch(compiled, grid, (*arguments, *(constants[name] for name in rest))))


@contextlib.contextmanager
def placed(place: Any) -> Iterator[None]:
    """Inside, launches of this thread go to `place.launch(kernel, grid, arguments, constants)` first; True: it took them."""
    before, _STATE.place = getattr(_STATE, "place", None), place
    try:
        yield
    finally:
        _STATE.place = before


def record(launch: Any) -> None:
    """Notes what was launched, where this thread is recording."""
    recording = getattr(_STATE, "recording", None)
    if recording is not None:
        recording.append(launch)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects this thread's launches inside the block."""
    before, _STATE.recording = getattr(_STATE, "recording", None), []
    try:
        yield _STATE.recording
    finally:
        _STATE.recording = before
