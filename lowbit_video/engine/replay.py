"""Plans: what a GPU call launched, to be launched again on tensors of the same shapes, strides and alignment.

The first call of a kind checks, selects, lays out its workspace and goes through Triton's own launcher; all of it
depends on shapes and choices, never on values. A plan keeps the outcome: compiled kernels, grids and arguments, in
which only addresses change. A later call allocates, fills the addresses in and launches.
"""
from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from .options import AttentionOptions

MOST_PLANS = 512
"""Plans kept; when there are more, the oldest go."""
LAUNCHER_VERSIONS = ("3.6.",)
"""Beginnings of the Triton versions whose launcher takes arguments as `Plan.run` gives them; others launch the long way."""
ENVIRONMENT = "LOWBIT_VIDEO_PLANS"
"""Environment variable; while it is "0" every launch goes through Triton's launcher, to tell its faults from ours."""
ALIGNMENT = 16
"""Triton compiles for pointers that are multiples of 16 bytes, and for others; TMA takes only the former."""

_PLANS: dict[tuple, Plan] = {}
_KEEPING = threading.Lock()


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


class Step(NamedTuple):
    """One launch. patches: (argument, tensor, byte offset, None or a descriptor's (shape, strides, padding))."""

    run: Any
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    arguments: tuple[Any, ...]
    patches: tuple[tuple[int, int, int, tuple | None], ...]


def key_of(runtime: Any, tensors: Sequence[Any], options: AttentionOptions, lengths: tuple[int, int] | None) -> tuple | None:
    """Everything that a plan depends on; None where there is none: on a CPU, where values are looked at, for choices that
    are tensors (their value may change), or while LOWBIT_VIDEO_PLANS is "0".

    lengths: the longest packed sequences. The address pattern counts too: q, k and v may be one tensor.
    """
    signatures = [runtime.signature(t) for t in tensors]
    if None in signatures or options.check_finite or os.environ.get(ENVIRONMENT) == "0":
        return None
    if any(hasattr(choice, "data_ptr") for choice in (options.scale, *(lengths or ()))):
        return None
    pointers = [t.data_ptr() for t in tensors]
    return (runtime.NAME, *signatures, tuple(pointer % ALIGNMENT for pointer in pointers),
            tuple(pointers.index(pointer) for pointer in pointers), options, lengths)


def find(key: tuple | None) -> Plan | None:
    """The plan of a key, if there is one and no profiler's hook is set."""
    plan = _PLANS.get(key)
    return None if plan is None or _watched() else plan


def keep(key: tuple, plan: Plan | None) -> None:
    """Remembers a plan, if it is one; forgets the oldest beyond MOST_PLANS."""
    if plan is None:
        return
    with _KEEPING:
        _PLANS[key] = plan
        while len(_PLANS) > MOST_PLANS:
            del _PLANS[next(iter(_PLANS))]


def clear() -> None:
    """Forgets all plans."""
    with _KEEPING:
        _PLANS.clear()


def _watched() -> bool:
    """Whether a profiler hooked Triton's launches: then they go through Triton, which tells it."""
    hooks = sys.modules["triton"].knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook))


class Plan:
    """The launches of one kind of call.

    variant: the kernel variant selected. out, lse, workspace: (shape, dtype name) to allocate, or None. steps: the launches;
    their patches number the tensors: the call's own first, then out, lse and workspace.
    """

    def __init__(self, variant: Any, out: tuple, lse: tuple | None, workspace: tuple | None, steps: Sequence[Step]) -> None:
        self.variant, self.fresh, self.steps = variant, (out, lse, workspace), tuple(steps)

    def run(self, runtime: Any, tensors: Sequence[Any]) -> tuple[Any, Any] | None:
        """Launches everything on tensors of the plan's key; (out, lse or None), or None (nothing launched) where the allocator
        gave memory that is aligned less than the kernels were compiled for."""
        like = tensors[0]
        fresh = [None if one is None else runtime.empty(*one, like) for one in self.fresh]
        new = [0 if t is None else t.data_ptr() for t in fresh]
        if any(address % ALIGNMENT for address in new):
            return None
        addresses = [t.data_ptr() for t in tensors] + new
        with runtime.launch_guard(like):
            stream = runtime.stream(like)
            for run, grid, function, metadata, arguments, patches in self.steps:
                values = list(arguments)
                for index, tensor, offset, descriptor in patches:
                    address = addresses[tensor] + offset
                    values[index] = address if descriptor is None else Descriptor(Address(address), *descriptor)
                run(*grid, stream, function, metadata, None, None, None, *values)
        return fresh[0], fresh[1]


def make(launches: Sequence[Any], variant: Any, runtime: Any, tensors: Sequence[Any], out: Any, lse: Any,
         workspace: Any) -> Plan | None:
    """The plan of a call from its recorded launches (`kernels.launch.recorded`); None where it cannot be repeated like this."""
    triton = sys.modules.get("triton")
    if triton is None or not triton.__version__.startswith(LAUNCHER_VERSIONS) or not launches:
        return None
    fresh = (out, lse, workspace)
    addresses = [t.data_ptr() for t in tensors] + [None if t is None else t.data_ptr() for t in fresh]
    if any(t is not None and t.data_ptr() % ALIGNMENT for t in fresh):
        return None
    own = {address: number for number, address in reversed(list(enumerate(addresses))) if address is not None}
    begin, size = (addresses[-1], runtime.shape(workspace)[0]) if workspace is not None else (0, 0)

    def place(address: int) -> tuple[int, int] | None:
        if begin <= address < begin + size:
            return len(addresses) - 1, address - begin
        return (own[address], 0) if address in own else None

    steps = []
    for compiled, grid, arguments in launches:
        if compiled is None:
            return None
        values, patches = list(arguments), []
        for index, value in enumerate(values):
            descriptor = hasattr(value, "block_shape")
            if not descriptor and not hasattr(value, "data_ptr"):
                continue
            where = place((value.base if descriptor else value).data_ptr())
            if where is None:
                return None
            patches.append((index, *where, (list(value.shape), list(value.strides), value.padding) if descriptor else None))
            values[index] = None
        steps.append(Step(compiled.run, (*grid, 1, 1)[:3], compiled.function, compiled.packed_metadata, tuple(values),
                          tuple(patches)))
    describe = lambda t: None if t is None else (runtime.shape(t), runtime.dtype_name(t))
    return Plan(variant, *(describe(t) for t in fresh), steps)
