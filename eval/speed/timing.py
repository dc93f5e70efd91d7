"""Timing on a GPU by CUDA events, from a cold L2 cache, for tensors of either framework."""
from __future__ import annotations

import math
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
        passes = int(min(MOST_PASSES, 1 + HOST_MARGIN * host_us * 1e-3 * MEMORY_BYTES_PER_MS / L2_BYTES))
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
                  max_runs: int = 40, least_rounds: int = LEAST_ROUNDS, slow_ms: float = math.inf,
                  told: Callable[[dict[str, Timing]], None] = lambda times: None,
                  failed: Callable[[str, Exception], None] | None = None) -> dict[str, Timing]:
    """Times several calls in turns, all equally often, so that clocks, power and temperature are shared fairly.

    Every other round goes backwards, and a turn begins with a run that does not count: what ran just before lowers or raises a
    call by some percent. budget_ms: device time of the slowest call's counted runs over all rounds; fewer rounds, least_rounds
    at least, where the slowest call would exceed it; at most max_runs a call.
    slow_ms: where one of the calls, which have all run before, takes longer, every run counts from the first on, and `told`
    gets the times so far after each turn.
    failed: gets the name and the error of a call that fails; it is left out from there on. None: the error is raised.
    """
    calls, host, once = dict(calls), {}, {}
    samples: dict[str, list[float]] = {}

    def attempt(name: str, default: Any, run: Callable[..., Any], *given: Any) -> Any:
        try:
            return run(*given)
        except Exception as error:  # noqa: BLE001 - as the caller says
            if failed is None:
                raise
            failed(name, error)
            del calls[name]
            return default

    def times() -> dict[str, Timing]:
        return {name: summarise(samples[name], host[name]) for name in calls if samples.get(name)}

    for name in list(calls) if slow_ms < math.inf else ():
        once[name], host[name] = attempt(name, (0.0, 0.0), _first_run, timer, calls[name])
        samples[name] = [once[name]]
        told(times())
    if not (slow := max(once.values(), default=0.0) >= slow_ms):
        for name in list(calls):
            host[name] = attempt(name, 0.0, timer.host_us, calls[name])
        once = {name: min(attempt(name, [0.0], timer.sample, calls[name], 2, host[name])) for name in list(calls)}
        samples = {name: [] for name in calls}
    affordable = int(budget_ms / max([*once.values(), 1e-3]))
    rounds = min(rounds, max(least_rounds, affordable))
    runs = max(1, min(max_runs, affordable) // rounds)
    for turn in range(int(slow), rounds):
        for name in list(calls)[::-1 if turn % 2 else 1]:
            settling = 1 if once[name] < SETTLES_MS and not slow else 0
            samples[name] += attempt(name, [], timer.sample, calls[name], settling + runs, host[name])[settling:]
            if slow:
                told(times())
    return times()


def _first_run(timer: Timer, call: Callable[[], object]) -> tuple[float, float]:
    """A call's device time in ms, and its host's part in us: as long as the device's queue has room."""
    host_us = 0.0

    def watched() -> None:
        nonlocal host_us
        begin = time.perf_counter()
        call()
        host_us = (time.perf_counter() - begin) * 1e6

    return timer.sample(watched, 1, math.inf)[0], host_us


def summarise(times: list[float], host_us: float = 0.0) -> Timing:
    """Median and 10th/90th percentile (nearest rank) of times in ms."""
    ordered = sorted(times)
    rank = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]
    return Timing(statistics.median(ordered), rank(0.1), rank(0.9), len(ordered), host_us)
