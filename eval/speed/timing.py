"""Timing on a GPU by CUDA events, from a cold L2 cache, for tensors of either framework."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowbit_video.runtime import cuda_driver

L2_BYTES = 256 * 2**20
"""Overwritten before every timed run: several times any GPU's L2, so that inputs come from memory."""
HOST_MARGIN = 4
"""The overwriting lasts this many times the host's part of a call, so that launches never wait for the host."""
MOST_PASSES = 64
"""A call whose host part is longer than this many passes waits for the device anyway."""
MEMORY_BYTES_PER_MS = 2.0e9
"""A cautious rate of overwriting, to turn host time into a number of passes."""

LEAST_ROUNDS = 3
"""Turns of every call, however slow one of them is."""
SETTLES_MS = 50.0
"""A call that takes longer needs no run before those that count: what ran before it is a small part of it."""


@dataclass(frozen=True)
class Timing:
    """Device time of one call: median and the 10th and 90th percentile in ms, over `runs`; host_us is the host's part."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    host_us: float


class Timer:
    """Times calls on one stream. `runtime` and `like` (any tensor there) say where."""

    def __init__(self, runtime: Any, like: Any) -> None:
        self._stream = runtime.stream(like)
        self._flush = runtime.empty((L2_BYTES,), "uint8", like)

    def synchronize(self) -> None:
        cuda_driver.synchronize(self._stream)

    def sample(self, call: Callable[[], object], runs: int, host_us: float) -> list[float]:
        """Device times in ms of `runs` calls, each from a cold cache."""
        passes = min(MOST_PASSES, 1 + int(HOST_MARGIN * host_us * 1e-3 * MEMORY_BYTES_PER_MS / L2_BYTES))
        events = [(cuda_driver.Event(), cuda_driver.Event()) for _ in range(runs)]
        for begin, end in events:
            for _ in range(passes):
                cuda_driver.fill_bytes(self._flush.data_ptr(), 0, L2_BYTES, self._stream)
            begin.record(self._stream)
            call()
            end.record(self._stream)
        self.synchronize()
        return [begin.elapsed_ms(end) for begin, end in events]

    def first_call_ms(self, call: Callable[[], object]) -> float:
        """Wall time of one call and its wait: compilation, for the first call of a kernel."""
        begin = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def host_us(self, call: Callable[[], object], calls: int = 5) -> float:
        """Median wall time of the host's part of a call, in microseconds; the device is idle at its beginning."""
        times = []
        first = time.perf_counter()
        while len(times) < calls and time.perf_counter() - first < 0.2:
            self.synchronize()
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
        self.synchronize()
        return statistics.median(times)


def time_together(timer: Timer, calls: dict[str, Callable[[], object]], *, budget_ms: float = 400.0, rounds: int = 8,
                  max_runs: int = 40) -> dict[str, Timing]:
    """Times several calls in turns, all equally often, so that clocks, power and temperature are shared fairly.

    Every other round goes backwards, and a turn begins with a run that does not count: what ran just before lowers or raises a
    call by some percent. budget_ms: device time of the slowest call's counted runs over all rounds; fewer rounds, LEAST_ROUNDS
    at least, where the slowest call would exceed it; at most max_runs a call.
    """
    host = {name: timer.host_us(call) for name, call in calls.items()}
    once = {name: min(timer.sample(call, 2, host[name])) for name, call in calls.items()}
    affordable = int(budget_ms / max([*once.values(), 1e-3]))
    rounds = min(rounds, max(LEAST_ROUNDS, affordable))
    runs = max(1, min(max_runs, affordable) // rounds)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[::-1 if turn % 2 else 1]:
            settling = 1 if once[name] < SETTLES_MS else 0
            samples[name] += timer.sample(calls[name], settling + runs, host[name])[settling:]
    return {name: summarise(times, host[name]) for name, times in samples.items()}


def summarise(times: list[float], host_us: float = 0.0) -> Timing:
    """Median and 10th/90th percentile (nearest rank) of times in ms."""
    ordered = sorted(times)
    rank = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
    return Timing(statistics.median(ordered), rank(0.1), rank(0.9), len(ordered), host_us)
