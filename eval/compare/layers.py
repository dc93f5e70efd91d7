"""Where the error comes from: per layer, step and head, every candidate against exact attention on the same q, k, v.

One exact run is recorded: at each attention call every candidate runs as well, on the same hidden states (hence the same
q, k, v), its output before the output projection is compared head by head, and the exact result goes on. Then short runs
measure what reaches the final latent: the candidate in one layer only (all steps), in one group of steps only (all layers),
and everywhere. The share of each (layer, step, head) is the local squared error, scaled so that the sums over each layer
and over each step group are those measured (iterative proportional fitting).
"""
from __future__ import annotations

import fnmatch
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowbit_video.hook.base import slot_of
from lowbit_video.hook.order import order_of, warn_of_order
from lowbit_video.hook.processors import ExactAttnProcessor, LowBitAttnProcessor
from lowbit_video.hook.recipe.clock import clock_of
from lowbit_video.hook.recipe.processor import RecipeAttnProcessor
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.hook.report import attention_modules, transformer_of
from lowbit_video.runtime.detect import runtime_of

from ..metrics import registry
from .candidates import Candidate, applied, as_candidate, floor_candidate
from .layer_table import LayerTable
from .progress import Progress
from .settings import Settings, environment

STEP_GROUPS = 4
FIT_ROUNDS = 200


class Tapped:
    """An attention module seen by a processor: everything is the module's own, and what enters `to_out` is kept in `seen`."""

    def __init__(self, attn: Any) -> None:
        self._attn, self.seen = attn, None
        self.to_out = [self._tap, *[attn.to_out[i] for i in range(1, len(attn.to_out))]]

    def _tap(self, x: Any) -> Any:
        self.seen = x  # [B, N, H * D], text tokens first
        return self._attn.to_out[0](x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


class StepClock:
    """Counts denoising steps; its `tick` is the pipeline's `callback_on_step_end`, keeps the latents and tells the progress."""

    def __init__(self, progress: Progress) -> None:
        self.step, self.latents, self.progress = 0, None, progress

    def tick(self, pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        """One step has ended."""
        self.step, self.latents = step + 1, values["latents"]
        return self.progress.step(pipe, step, timestep, values)


class Recorder:
    """The processor of one module in the recorded run: exact goes on, candidates are measured beside it."""

    def __init__(self, candidates: list[Any], clock: StepClock) -> None:
        self.exact, self.candidates, self.clock = ExactAttnProcessor(), candidates, clock
        self.rows: dict[int, list[np.ndarray]] = {}  # step -> one [C, metrics + 1, H] a call

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any = None,
                 image_rotary_emb: Any = None) -> tuple[Any, Any]:
        """As any processor; gives what exact attention gives."""
        slot_of(attn, hidden_states)  # the module's own; of a Tapped it would be another class's
        to_numpy = runtime_of(hidden_states).to_numpy
        inputs = (hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        tapped = Tapped(attn)
        result = self.exact(tapped, *inputs)
        exact = heads_of(to_numpy(tapped.seen), attn.heads)
        rows = []
        for candidate in self.candidates:
            tapped = Tapped(attn)
            (candidate or self.exact)(tapped, *inputs)
            rows.append(head_errors(heads_of(to_numpy(tapped.seen), attn.heads), exact))
        self.rows.setdefault(self.clock.step, []).append(np.stack(rows))
        return result


def heads_of(joined: np.ndarray, heads: int) -> np.ndarray:
    """[B, N, H * D] -> [B, N, H, D]."""
    return joined.reshape(*joined.shape[:2], heads, -1)


def head_errors(output: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Every kernel-level metric, and last the sum of squared errors, of each head: [metrics + 1, H].

    output, exact: [B, N, H, D]. One head at a time: a long video's heads together would not fit twice in float64.
    """
    metrics = registry.of_kind("tensor")
    out = np.empty((len(metrics) + 1, output.shape[2]))
    for head in range(output.shape[2]):
        pair = output[:, :, head], exact[:, :, head]
        out[:-1, head] = [metric.module.measure(*pair) for metric in metrics]
        out[-1, head] = np.square(pair[0].astype(np.float64) - pair[1]).sum()
    return out


class Gated:
    """A processor that works in some steps only; the others are exact."""

    def __init__(self, processor: Any, clock: StepClock, steps: range) -> None:
        self.inside, self.outside, self.clock, self.steps = processor, ExactAttnProcessor(), clock, steps

    @functools.wraps(ExactAttnProcessor.__call__)  # diffusers passes what it finds in the signature
    def __call__(self, *arguments: Any, **named: Any) -> tuple[Any, Any]:
        return (self.inside if self.clock.step in self.steps else self.outside)(*arguments, **named)


def by_module(candidate: Candidate, model: Any, **hook: Any) -> dict[str, Any]:
    """The candidate's processor for each module of a model; modules that its patterns leave alone are not in it.

    Those of a recipe with rules for steps go by what the pipeline says of its steps (`denoising_step`).
    """
    wanted = candidate.make()
    if isinstance(wanted, Recipe):
        return {name: RecipeAttnProcessor(plan, clock_of(model), **hook) for name, plan in wanted.resolve(model).layers.items()}
    names = list(attention_modules(model))
    chosen = dict.fromkeys(names, wanted)
    if isinstance(wanted, dict):
        chosen = {name: processor for pattern, processor in wanted.items() for name in names
                  if fnmatch.fnmatchcase(name, pattern)}
    made: dict[Any, Any] = {}
    for name, processor in chosen.items():
        if not callable(processor):
            processor = made.setdefault(str(processor), LowBitAttnProcessor(processor, **hook))
        chosen[name] = processor
    return chosen


def fit_shares(squared_error: np.ndarray, layer_error: np.ndarray, step_error: np.ndarray, groups: list[range]) -> np.ndarray:
    """Scale local squared errors [L, S, H] so that layers and step groups sum as measured; the whole sums to 1.

    layer_error [L], step_error [G]: relative errors of the final latent (squared here: independent errors add as squares).

    Source: iterative proportional fitting (Deming and Stephan 1940).
    """
    share = np.array(squared_error, np.float64)
    if not share.any():
        return share
    layers, steps = np.square(layer_error), np.square(step_error)
    if layers.sum() == 0 or steps.sum() == 0:
        return share / share.sum()
    for _ in range(FIT_ROUNDS):
        rows = share.sum(axis=(1, 2))
        share *= np.divide(layers / layers.sum(), rows, out=np.zeros_like(rows), where=rows > 0)[:, None, None]
        for group, part in zip(groups, steps / steps.sum()):
            total = share[:, group].sum()
            share[:, group] *= part / total if total > 0 else 0.0
    return share / share.sum()


def step_groups(steps: int, groups: int = STEP_GROUPS) -> list[range]:
    """Steps 0..steps-1 in at most `groups` runs of nearly equal length."""
    edges = np.linspace(0, steps, min(groups, steps) + 1).round().astype(int)
    return [range(a, b) for a, b in zip(edges, edges[1:])]


def measure_layers(pipe, prompt: str, candidates: Sequence, *, seed: int = 0, settings: Settings | None = None,
                   measured_shares: bool = True, backend: str = "auto", fallback: str | None = None,
                   say: Callable[[str], None] = print) -> LayerTable:
    """Record one prompt.

    Args:
        pipe: as in `compare`; its call takes `callback_on_step_end` and output_type="latent".
        candidates: precisions, recipes, "module:Class" names, or `Candidate`s.
        measured_shares: measure what reaches the final latent (layers + step groups + 1 runs a candidate, without the
            VAE); otherwise shares are those of the local squared error alone.
        backend, fallback: of the low-bit hook.

    Raises:
        ValueError: no candidates, an unknown one, a recipe that does not fit the model, or a model without attention modules
            that take a processor.
    """
    settings = settings or Settings()
    candidates = [as_candidate(c) for c in candidates]
    if not candidates:
        raise ValueError("no candidates given; name precisions or module:Class")
    model = transformer_of(pipe)
    names = list(attention_modules(model))
    if not names:
        raise ValueError("the model has no attention module that takes a processor")
    for wanted in (candidate.make() for candidate in candidates):
        warn_of_order(wanted if isinstance(wanted, Recipe) else None, model)
    hook = {"backend": backend, "fallback": fallback}
    planned = ["record", "floor"]
    for candidate in candidates if measured_shares else []:
        planned += [candidate.label] * (1 + len(by_module(candidate, model, **hook)) + STEP_GROUPS)
    progress = Progress(planned, say)
    clock = StepClock(progress)

    def latents_of(modules: Any, whole: Candidate | None = None) -> np.ndarray:
        """The final latents with the given processors by module name."""
        clock.step = 0
        arguments = {**settings.arguments(), "seed": seed, "output_type": "latent", "progress": False}
        with applied(pipe, whole or Candidate("modules", lambda: modules)):
            pipe(prompt, **arguments, callback_on_step_end=clock.tick)
        return runtime_of(clock.latents).to_numpy(clock.latents).astype(np.float64)

    def timed(label: str, text: str, modules: Any, whole: Candidate | None = None) -> np.ndarray:
        begin = time.perf_counter()
        progress.begin(label)
        latents = latents_of(modules, whole)
        progress.done(label, time.perf_counter() - begin, text)
        return latents

    per_candidate = [by_module(c, model, **hook) for c in candidates]
    recorders = {name: Recorder([processors.get(name) for processors in per_candidate], clock) for name in names}
    exact = timed("record", "recorded every candidate beside exact attention", recorders)
    size = np.linalg.norm(exact)
    steps = clock.step
    groups = step_groups(steps)
    table = np.array([[np.mean(recorders[name].rows[step], axis=0) for step in range(steps)] for name in names])
    table = table.transpose(2, 3, 0, 1, 4)  # [C, metrics, L, S, H]
    errors = {name: table[:, i] for i, name in enumerate([*[m.name for m in registry.of_kind("tensor")], "squared_error"])}

    def error(latents: np.ndarray) -> float:
        return float(np.linalg.norm(latents - exact) / size)

    floor = error(timed("floor", "floor: exact attention, reordered", None, floor_candidate()))
    shape = len(candidates), len(names)
    latent_error, layer_error = np.full(shape[0], np.nan), np.full(shape, np.nan)
    step_error = np.full((shape[0], len(groups)), np.nan)
    share = np.zeros(errors["squared_error"].shape)
    for c, candidate in enumerate(candidates):
        local = errors["squared_error"][c]
        if not measured_shares:
            share[c] = local / local.sum() if local.any() else local
            continue
        fresh = lambda: by_module(candidate, model, **hook)  # noqa: B023 - used within this round only
        latent_error[c] = error(timed(candidate.label, f"{candidate.label} everywhere", fresh()))
        layer_error[c] = 0.0
        for name, processor in fresh().items():
            latents = timed(candidate.label, f"{candidate.label} in {name} only", {name: processor})
            layer_error[c, names.index(name)] = error(latents)
        for g, group in enumerate(groups):
            gated = {name: Gated(processor, clock, group) for name, processor in fresh().items()}
            text = f"{candidate.label} in steps {group.start}-{group.stop - 1} only"
            step_error[c, g] = error(timed(candidate.label, text, gated))
        share[c] = fit_shares(local, layer_error[c], step_error[c], groups)
    about = {"prompt": prompt, "seed": seed, "settings": settings.as_dict(), "order": order_of(pipe), "steps": steps,
             "environment": environment(), "step_groups": [[g.start, g.stop] for g in groups],
             "shares": "measured" if measured_shares else "local"}
    return LayerTable([c.label for c in candidates], names, errors, share, latent_error, layer_error, step_error, floor, about)
