"""Plans: what a GPU call launched, to be launched again on tensors of the same shapes, strides and alignment.

The first call of a kind checks, selects, lays out its workspace and goes through the backend's own launcher; all of it
depends on shapes and choices, never on values. A plan keeps the outcome: each launch as what repeats it with other addresses
(`Launch.replay`). A later call allocates and launches.
"""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowbit_video.kernels.buffers import Buffer, Origin
from lowbit_video.kernels.launch import Replay, recorded

from ..runtime import cuda_driver
from ..runtime.protocol import Runtime
from .options import AttentionOptions

MOST_PLANS = 512
"""Plans kept; when there are more, the oldest go."""
ENVIRONMENT = "LOWBIT_VIDEO_PLANS"
"""Environment variable; while it is "0" every launch goes through its own launcher, to tell its faults from ours."""
ALIGNMENT = 16
"""Triton compiles for pointers that are multiples of 16 bytes, and for others; TMA takes only the former."""
TENSORS = ("q", "k", "v", "cu_q", "cu_k")
"""Names of a call's tensors, in their order, before those of its steps; the names that `Buffer.origin` gives."""
FRESH = ("out", "lse", "workspace")
"""Names of what a call allocates."""

WHOLE = (int, np.integer)

_PLANS: dict[tuple, Plan] = {}
_REFUSED: dict[str, int] = {}
_KEEPING = threading.Lock()


def key_of(runtime: Runtime, tensors: Sequence[Any], options: AttentionOptions, lengths: tuple[int, int] | None
           ) -> tuple | None:
    """Everything that a plan depends on; None where there is none: on a CPU, where values are looked at, for choices that
    are tensors (their value may change), or while LOWBIT_VIDEO_PLANS is "0".

    lengths: the longest packed sequences.
    """
    signatures = [runtime.signature(t) for t in tensors]
    if None in signatures or options.check_finite or os.environ.get(ENVIRONMENT) == "0":
        return None
    if hasattr(options.scale, "data_ptr") or not all(isinstance(length, WHOLE) for length in lengths or ()):
        return None
    return (runtime.NAME, *signatures, *[t.data_ptr() % ALIGNMENT for t in tensors], options, lengths)


def find(key: tuple | None) -> Plan | None:
    """The plan of a key, if there is one and no profiler's hook is set."""
    plan = _PLANS.get(key)
    return None if plan is None or plan.watched() else plan


def keep(key: tuple, plan: Plan | None) -> None:
    """Remembers a plan, if it is one; forgets the oldest beyond MOST_PLANS."""
    if plan is None:
        return
    with _KEEPING:
        _PLANS[key] = plan
        while len(_PLANS) > MOST_PLANS:
            del _PLANS[next(iter(_PLANS))]


def clear() -> None:
    """Forgets all plans, and what could not be one."""
    with _KEEPING:
        _PLANS.clear()
        _REFUSED.clear()


class Plan:
    """The launches of one kind of call.

    variant: the kernel variant selected. fresh: (shape, dtype name) of out, lse and workspace to allocate, or None. replays:
    the launches, on the addresses of the call's tensors, then of the fresh ones. watchers: who may want to see them.
    """

    def __init__(self, variant: Any, fresh: Sequence[tuple | None], replays: Sequence[Replay],
                 watchers: Sequence[Callable[[], bool]]) -> None:
        self.variant, self.fresh, self.replays, self.watchers = variant, tuple(fresh), tuple(replays), tuple(watchers)

    def watched(self) -> bool:
        """Whether the launches must go through their own launcher, because a profiler watches it."""
        for watcher in self.watchers:
            if watcher():
                return True
        return False

    def run(self, runtime: Runtime, tensors: Sequence[Any]) -> tuple[Any, Any] | None:
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
            for replay in self.replays:
                replay(stream, addresses)
        return fresh[0], fresh[1]


def make(launches: Sequence[Any], variant: Any, runtime: Runtime, names: Sequence[str], fresh: Sequence[Any]
         ) -> Plan | None:
    """The plan of a call from its recorded launches (`kernels.launch.recorded`); None where it cannot be repeated like this.

    names: of the call's tensors. fresh: out, lse and workspace as the call allocated them, or None.
    """
    if any(t is not None and t.data_ptr() % ALIGNMENT for t in fresh):
        return None
    numbers = {name: number for number, name in enumerate((*names, *FRESH))}
    replays = _replays(launches, numbers)
    if not replays:
        return None
    described = [None if t is None else (runtime.shape(t), runtime.dtype_name(t)) for t in fresh]
    return Plan(variant, described, replays, dict.fromkeys(launch.watched for launch in launches))


def _replays(launches: Sequence[Any], numbers: dict[str, int]) -> list[Replay]:
    """What repeats each launch; none where one of them cannot be repeated, which is noted.

    numbers: the place of each tensor among the addresses, by name.
    """
    found = [launch.replay(cuda_driver, numbers) for launch in launches]
    refused = [one for one in found if isinstance(one, str)]
    with _KEEPING:
        for reason in refused:
            _REFUSED[reason] = _REFUSED.get(reason, 0) + 1
    return [] if refused else found


def not_repeated() -> dict[str, int]:
    """What had to go through Triton's own launcher again and again and why, "kernel: reason", and how many calls did."""
    with _KEEPING:
        return dict(_REFUSED)


def again(key: tuple, runtime: Runtime, tensors: Sequence[Any], launch: Callable[..., None]) -> None:
    """Launches what `launch(*buffers)` launches, a buffer of each tensor given; after the first time of a key by replay.

    key: everything but the tensors' addresses that the launches depend on.
    """
    like = tensors[0]
    addresses = [t.data_ptr() for t in tensors]
    full = (key, runtime.NAME, runtime.place(like), *[address % ALIGNMENT for address in addresses])
    plan = None if os.environ.get(ENVIRONMENT) == "0" else find(full)
    with runtime.launch_guard(like):
        if plan is not None:
            stream = runtime.stream(like)
            for replay in plan.replays:
                replay(stream, addresses)
            return
        buffers = [Buffer(address, runtime.dtype_name(t), Origin(str(number)))
                   for number, (address, t) in enumerate(zip(addresses, tensors))]
        with recorded() as launches:
            launch(*buffers)
    replays = _replays(launches, {str(number): number for number in range(len(tensors))})
    if replays:
        keep(full, Plan(None, (), replays, dict.fromkeys(one.watched for one in launches)))
