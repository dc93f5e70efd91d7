"""What is measured of one prompt: each rung's error by layer, range of steps and head, and what reaches the final latent.

One exact run is recorded: at a sample of steps and of query rows every rung computes the same attention beside exact. Then one
short run for each range of steps, with a probing rung in that range alone, says how far an error made there gets: its squared
error of the final latent over the local errors of the range. Layers are weighed alike, by the error of their output relative to
that output.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowbit_video.errors import UnsupportedError
from lowbit_video.hook.apply import apply
from lowbit_video.hook.processors import ExactAttnProcessor, LowBitAttnProcessor
from lowbit_video.hook.report import attention_modules, transformer_of
from lowbit_video.kernels.pooled.tiles import query_tile
from lowbit_video.runtime.detect import runtime_of

from ..compare.layers import Gated, StepClock
from ..compare.progress import Progress
from ..compare.settings import Settings
from .pooled import Look, rows_of_tiles


@dataclass(frozen=True)
class Measured:
    """errors: [R, L, G, H], squared error of a rung's output over the squared output of the whole layer. gains: [G], squared
    error of the final latent for a range's errors of 1. peaks: [L, G, H, 3], the largest magnitudes of Q, K and V, where they
    were asked for. tokens, head_dim: of the attention."""

    errors: np.ndarray
    gains: np.ndarray
    peaks: np.ndarray | None
    tokens: int
    head_dim: int

    def weighed(self) -> np.ndarray:
        """[R, L, G, H], what each cell adds to the squared relative error of the final latent."""
        return self.errors * self.gains[None, None, :, None]


class Probe(ExactAttnProcessor):
    """Exact attention of one module; at some steps every rung is measured beside it.

    rungs: their processors. rows: about how many query rows are compared, evenly spaced; where some rung pools keys, in whole
        tiles, for the rows of a tile choose together. steps: those that are measured. peaked: whether the largest magnitudes
        are wanted, for which all of Q, K and V is copied to the host.
    squared: step -> one [R, H] a call; whole: step -> squared outputs; peaks: step -> one [H, 3] a call.
    """

    def __init__(self, rungs: Sequence[LowBitAttnProcessor], rows: int, clock: StepClock, steps: set[int],
                 peaked: bool = False) -> None:
        super().__init__()
        self.rungs, self.rows, self.clock, self.steps, self.peaked = rungs, rows, clock, steps, peaked
        self.squared: dict[int, list[np.ndarray]] = {}
        self.whole: dict[int, list[float]] = {}
        self.peaks: dict[int, list[np.ndarray]] = {}
        self.shape: tuple[int, ...] = ()

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        """Exact attention goes on."""
        out = super().attend(q, k, v, is_causal, scale, return_lse)
        if self.clock.step not in self.steps:
            return out
        if is_causal or return_lse:
            raise UnsupportedError("calibration measures attention that is not causal and asks for no LSE")
        runtime = runtime_of(q)
        self.shape = tuple(runtime.shape(q))
        rows, placed = self._compared()
        cut = lambda t: t[:, rows[0]] if len(rows) == 1 else runtime.concat([t[:, some] for some in rows], 1)
        compared = lambda t: runtime.to_numpy(t)[:, placed:]
        exact, few = compared(cut(out)).astype(np.float64), cut(q)
        low = [compared(rung.attend(few, k, v, scale=scale)) for rung in self.rungs]
        self.squared.setdefault(self.clock.step, []).append(np.stack([np.square(x - exact).sum((0, 1, 3)) for x in low]))
        self.whole.setdefault(self.clock.step, []).append(float(np.square(exact).sum()))
        if self.peaked:
            tops = [np.abs(runtime.to_numpy(x)).max((0, 1, 3)) for x in (q, k, v)]
            self.peaks.setdefault(self.clock.step, []).append(
                np.stack([top.repeat(len(tops[0]) // len(top)) for top in tops], -1))  # heads that share keys share their peaks
        return out

    def _compared(self) -> tuple[list[slice], int]:
        """Query rows that are given to the rungs, and how many of the first ones are not compared."""
        text = [rung.pooled.always for rung in self.rungs if rung.pools]
        if text:
            return rows_of_tiles(self.shape[1], max(text), query_tile(self.shape[3]), self.rows)
        stride = max(1, self.shape[1] // self.rows)
        return [slice(stride // 2, None, stride)], 0

    def error(self, steps: set[int]) -> np.ndarray:
        """[R, H], the mean over calls of some steps."""
        return np.mean([squared / max(whole, 1e-30) for step in sorted(steps)
                        for squared, whole in zip(self.squared[step], self.whole[step])], axis=0)

    def peak(self, steps: set[int]) -> np.ndarray:
        """[H, 3], the largest of all calls of some steps."""
        return np.max([call for step in sorted(steps) for call in self.peaks[step]], axis=0)


def sampled(steps: range, samples: int) -> set[int]:
    """Some steps of a range, evenly spaced about its middle."""
    count = min(samples, len(steps))
    return {int(step) for step in steps.start + (np.arange(count) + 0.5) * len(steps) / count}


def labels(ranges: Sequence[range]) -> list[str]:
    """The runs of a prompt, for `Progress`."""
    return ["record", *["probe"] * len(ranges)]


def measure(pipe: Any, prompt: str, rungs: Sequence[str], probe: str, ranges: Sequence[range], settings: Settings, *, seed: int,
            samples: int, rows: int, backend: str, progress: Progress, peaks: bool = False) -> Measured:
    """Measures one prompt.

    rungs: without "exact", whose error is 0. probe: the one of them that is run in each range. ranges: of steps, all of them.
    samples: steps of a range that are recorded. rows: query rows that are compared. peaks: whether magnitudes are measured.
    """
    clock = StepClock(progress)
    names = list(attention_modules(transformer_of(pipe)))
    steps = [sampled(one, samples) for one in ranges]
    made = [LowBitAttnProcessor(rung, backend=backend) for rung in rungs]
    recorders = {name: Probe(made, rows, clock, set().union(*steps), peaks) for name in names}
    exact = latents_of(pipe, prompt, settings, seed, clock, recorders, "record", f"recorded: {prompt[:60]}")
    errors = np.stack([np.stack([recorders[name].error(some) for some in steps], 1) for name in names], 1)
    tops = np.stack([np.stack([recorders[name].peak(some) for some in steps]) for name in names]) if peaks else None
    gains = []
    for one, local in zip(ranges, errors[rungs.index(probe)].sum((0, 2))):
        gated = Gated(LowBitAttnProcessor(probe, backend=backend), clock, one)
        latents = latents_of(pipe, prompt, settings, seed, clock, dict.fromkeys(names, gated), "probe",
                             f"{probe} in steps {one.start}-{one.stop - 1}")
        gains.append(relative_error(latents, exact) / max(local, 1e-30))
    _, tokens, _, head_dim = recorders[names[0]].shape
    return Measured(errors, np.array(gains), tops, tokens, head_dim)


def look(pipe: Any, prompt: str, settings: Settings, seed: int, progress: Progress) -> tuple[int, int, int]:
    """Tokens of the attention, how many of them are text at the beginning, and the head dim: of one step."""
    seen = Look()
    latents_of(pipe, prompt, replace(settings, steps=1), seed, StepClock(progress), seen, "look", "looked at: tokens and text")
    return seen.tokens, seen.text, seen.head_dim


def latents_of(pipe: Any, prompt: str, settings: Settings, seed: int, clock: StepClock, attention: Any, label: str, text: str
               ) -> np.ndarray:
    """The final latents. attention: processors by module, or what `apply` takes for all, or None for the pipeline as it is."""
    progress = clock.progress
    progress.begin(label)
    begin, clock.step = progress.now(), 0
    by_module = isinstance(attention, dict)
    with apply(pipe, None if by_module else attention, attention if by_module else None):
        pipe(prompt, seed=seed, output_type="latent", progress=False, callback_on_step_end=clock.tick, **settings.arguments())
    progress.done(label, progress.now() - begin, text)
    return runtime_of(clock.latents).to_numpy(clock.latents).astype(np.float64)


def relative_error(latents: np.ndarray, exact: np.ndarray) -> float:
    """Squared error over squared size."""
    return float(np.square(latents - exact).sum() / np.square(exact).sum())
