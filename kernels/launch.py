"""Every launch of a Triton kernel passes through `launch`, so that a caller may record what a call launches, and repeat it.

Triton binds, specialises and looks up every argument of every launch anew, most of the host's part of a short
call. A recorded launch has all that behind it: the compiled kernel, the grid, the arguments in their order. A backend that
launches otherwise gives `record` something with the same two methods, `replay` and `watched`.
"""
from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from .shipped.choice import warn_of_speed

LAUNCHER_VERSIONS = ("3.6.",)
"""Beginnings of the Triton versions whose launcher takes arguments as `Launch.replay` gives them."""

Replay = Callable[[int, list[int]], None]
"""`replay(stream, addresses)`: one launch again, on a raw stream, with other addresses for the tensors it was given."""

_STATE = threading.local()


class Launch(NamedTuple):
    """A launch by Triton.

    compiled: what Triton launched (None under its interpreter). arguments: in the kernel's order, constants too.
    """

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    def replay(self, numbers: Mapping[str, int]) -> Replay | None:
        """What launches it again; None where it cannot be repeated: under an unknown Triton, or where an argument's memory
        has no known origin.

        numbers: the place of each origin's tensor among the addresses.
        """
        if self.compiled is None or not sys.modules["triton"].__version__.startswith(LAUNCHER_VERSIONS):
            return None
        values, patches = list(self.arguments), []
        for index, value in enumerate(values):
            shape = (list(value.shape), list(value.strides), value.padding) if hasattr(value, "block_shape") else None
            buffer = value.base if shape else value
            if not hasattr(buffer, "data_ptr"):
                continue
            if buffer.origin is None or buffer.origin.tensor not in numbers:
                return None
            patches.append((index, numbers[buffer.origin.tensor], buffer.origin.offset, shape))
            values[index] = None
        run, grid = self.compiled.run, (*self.grid, 1, 1)[:3]
        function, metadata, arguments, patches = self.compiled.function, self.compiled.packed_metadata, values, tuple(patches)

        def replay(stream: int, addresses: list[int]) -> None:
            values = arguments.copy()
            for index, tensor, offset, descriptor in patches:
                address = addresses[tensor] + offset
                values[index] = address if descriptor is None else Descriptor(Address(address), *descriptor)
            run(*grid, stream, function, metadata, None, None, None, *values)

        return replay

    @staticmethod
    def watched() -> bool:
        """Whether a profiler hooked Triton's launches: then they go through Triton, which tells it."""
        hooks = sys.modules["triton"].knobs.runtime
        return any(getattr(hook, "calls", hook) for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook))


class Descriptor:
    """What Triton's launcher reads of a TensorDescriptor."""

    __slots__ = ("base", "padding", "shape", "strides")

    def __init__(self, base: Address, shape: list[int], strides: list[int], padding: str) -> None:
        self.base, self.shape, self.strides, self.padding = base, shape, strides, padding


class Address(int):
    """An address as the base of a descriptor."""

    __slots__ = ()

    def data_ptr(self) -> int:
        return self


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
