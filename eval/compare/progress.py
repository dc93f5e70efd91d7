"""What a long job says of itself: a line a finished run, and within a slow one how far it is; each with the time left."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

QUIET_S = 20.0
"""After so long without a line the next denoising step says one: a start is foretold within a minute, busy machine or not."""


class Progress:
    """The time left, as the medians of what ran so far foretell it; before anything did, the steps of the first run.

    Args:
        todo: the label of every run that is to come; those of one label are taken to last equally long.
        say: takes each line.
        now: the time in seconds.
    """

    def __init__(self, todo: Iterable[str], say: Callable[[str], None], now: Callable[[], float] = time.perf_counter) -> None:
        self.left, self.say, self.now = list(todo), say, now
        self.total, self.seconds = len(self.left), {}
        self.begin(self.left[0] if self.left else "")

    def begin(self, run: str) -> None:
        """A run starts."""
        self.run, self.begun = run, self.now()
        self.said = self.begun

    def step(self, pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        """A denoising step has ended: the pipeline's `callback_on_step_end`, which changes nothing."""
        steps, now = getattr(pipe, "num_timesteps", 0), self.now()
        if now - self.said >= QUIET_S and steps:
            self.said, spent = now, now - self.begun
            whole = self._expected(self.run) or spent * steps / (step + 1)
            others = list(self.left)
            others.remove(self.run)
            remaining = max(whole - spent, 0) + sum(self._expected(run) or whole for run in others)
            self.say(f"{self._count(1)} {self.run}: step {step + 1} of {steps} after {clock(spent)}, about {clock(remaining)} "
                     + ("left" if self.seconds else "left, as the first steps foretell it"))
        return values

    def done(self, run: str, seconds: float, text: str) -> None:
        """Count one finished run."""
        self.left.remove(run)
        self.seconds.setdefault(run, []).append(seconds)
        remaining = sum(map(self._expected, self.left))
        self.say(f"{self._count()} {text}  {seconds:.1f} s"
                 + (f", about {clock(remaining)} left" if self.left else ", all done"))

    def _expected(self, run: str) -> float | None:
        """Seconds of a run of this label: the median of those so far, else of all; None where there are none."""
        known = self.seconds.get(run) or [s for runs in self.seconds.values() for s in runs]
        return statistics.median(known) if known else None

    def _count(self, more: int = 0) -> str:
        return f"[{self.total - len(self.left) + more:>{len(str(self.total))}}/{self.total}]"


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
