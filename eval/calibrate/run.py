"""`calibrate()`: a few prompts are measured, a budget is allocated, a recipe is written, and held-out prompts check it."""
from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_video.arguments import shown
from lowbit_video.files import write_whole
from lowbit_video.hook.order import order_of
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.hook.recipe.rule import STEP_DIGITS, Rule, steps_text
from lowbit_video.hook.report import attention_modules, transformer_of

from ..compare.layers import StepClock, step_groups
from ..compare.progress import Progress
from ..compare.settings import Settings, environment
from . import measure as measuring
from . import scales
from .costs import TABLE, Costs, bits_of, costs_of
from .measure import Measured, latents_of, look, measure, relative_error
from .pooled import PooledPlan
from .solve import Allocation, Budget, check_cost, db, solve

RUNGS = ("exact", "int8+fp16", "int8+fp8")
"""What may pay: INT4 and INT2 take longer than exact attention on the GPUs that were measured (README), and FP8 scores are no
faster than INT8's at head dim 64."""
SCHEMES = ("measured", "seed")
"""What chooses: errors that were measured, or the sizes of Q, K and V (`scales`)."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    rungs: that may be chosen. probe: the rung that measures how far errors of a range of steps get; its error must be large
    enough to be seen and small enough to add up. ranges: of steps, of equal length. samples: steps of each that are recorded.
    rows: query rows that are compared. by_head: whether heads of a layer may differ. scheme: one of SCHEMES. pooled: rungs
    with pooled keys beside these, where sequences are long enough and no bits are counted.
    Raises ValueError for a scheme that does not exist, or rungs that the scheme "seed" does not choose among.
    """

    rungs: tuple[str, ...] = RUNGS
    probe: str = "int4+fp16"
    ranges: int = 4
    samples: int = 1
    rows: int = 128
    by_head: bool = False
    scheme: str = "measured"
    pooled: PooledPlan = field(default_factory=PooledPlan)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {shown(self.scheme)}; there are: {', '.join(SCHEMES)}")
        if self.scheme == "seed" and self.rungs != scales.RUNGS:
            raise ValueError(f"rungs are {', '.join(self.rungs)}; the scheme \"seed\" chooses among {', '.join(scales.RUNGS)}")


def calibrate(pipe: Any, prompts: Sequence[str], budget: Budget | None, out: Path, *, held_out: Sequence[str] = (),
              settings: Settings | None = None, plan: Plan | None = None, seed: int = 0, speed: Path = TABLE,
              backend: str = "auto", kept: Path | None = None, say: Callable[[str], None] = print) -> Recipe:
    """Writes a recipe for a budget, and a picture beside it; the same prompts and settings give the same recipe.

    pipe: as in `compare`, or a `TorchPipeline`. prompts: measured; held_out: none of them; the recipe's latents are compared
        with exact ones there.
    budget: one of bits prices rungs by theirs; the scheme "seed" takes one of bits, or None, which leaves its thresholds.
        Where bits are counted, rungs with pooled keys, which have none, are left out.
    settings: steps, size and guidance; steps must be known. speed: the JSON of a kernel benchmark, which prices the rungs.
    kept: folder of what is measured of prompts, beside `out` by default; a second start goes on from there.
    Raises ValueError for no prompts or one that is held out too, for a budget that the scheme does not take or that cannot be
    met (one of time or of bits before anything is measured), and as `costs_of` and `bits_of`.
    """
    settings, plan = settings or Settings(), plan or Plan()
    check_budget(budget, plan.scheme)
    if not prompts or set(prompts) & set(held_out):
        raise ValueError("give at least one prompt to calibrate on, and others to check on")
    if not settings.steps:
        raise ValueError("the number of denoising steps is not known; give --steps")
    ranges = step_groups(settings.steps, plan.ranges)
    by_bits = plan.scheme == "seed" or budget.bits is not None
    rungs, costs, left_out = _rungs(pipe, prompts[0], settings, seed, plan, by_bits, speed, say)
    check_cost(budget, costs.of.values())
    measured_rungs = [rung for rung in dict.fromkeys((*rungs, plan.probe)) if rung != "exact"]
    order = order_of(pipe)
    kept = kept or out.parent / f"{out.stem}_measured"
    files = {prompt: _file(kept, prompt, seed, settings, plan, measured_rungs, order) for prompt in prompts}
    peaks = plan.scheme == "seed"
    todo = [prompt for prompt, file in files.items() if not file.is_file() or (peaks and _load(file).peaks is None)]
    if len(todo) < len(prompts):
        say(f"{len(prompts) - len(todo)} of {len(prompts)} prompts are measured already, in {kept}")
    progress = Progress([*measuring.labels(ranges) * len(todo), *["check"] * 2 * len(held_out)], say)
    for prompt in todo:
        _save(files[prompt], measure(pipe, prompt, measured_rungs, plan.probe, ranges, settings, seed=seed,
                                     samples=plan.samples, rows=plan.rows, backend=backend, progress=progress, peaks=peaks))
    measured = [_load(file) for file in files.values()]
    problem_of = lambda some: Problem.of(some, measured_rungs, costs, ranges, settings.steps, plan.by_head)
    problem = problem_of(measured)
    allocation = problem.solve(budget) if plan.scheme == "measured" else problem.by_scales(budget)
    names = list(attention_modules(transformer_of(pipe)))
    cells = problem.names(allocation)
    recipe = Recipe(rules_of(cells, names, problem.edges))
    say(f"costs are those of {costs.said}: {', '.join(f'{rung} {cost:.3g}' for rung, cost in costs.of.items())}")
    say(f"predicted: {db(allocation.error):.1f} dB of the final latent at {allocation.cost:.3f} {costs.unit}; everywhere: "
        + ", ".join(f"{rung} {db(error):.1f} dB at {cost:.3f}" for rung, (cost, error) in problem.uniform().items()))
    spread = sorted(db(problem_of([one]).error_of(allocation.rungs)) for one in measured)
    say(f"the prompts that were measured, each by itself: {spread[0]:.1f} to {spread[-1]:.1f} dB predicted")
    found = [_check(pipe, prompt, recipe, settings, seed, progress, say) for prompt in held_out]
    if found:
        within = sum(one >= round(spread[0], 2) for one in found)
        say(f"{within} of {len(found)} held-out prompts err no more than the worst of these")
    device = getattr(pipe, "device_name", environment()["device"])
    goal = _goal(plan.scheme, budget)
    recipe = Recipe(recipe.rules, _about(prompts, seed, settings, device, order, goal, allocation, spread, costs, left_out,
                                         found))
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe.save(out)
    from .plot import plot

    title = f"{Path(settings.model).name or 'model'}, {goal}; {costs.said}"
    plot(out.with_suffix(".png"), allocation, problem.uniform(), problem.paid(allocation), names,
         [steps_text(*edges) for edges in problem.edges], title, costs.unit)
    say(f"{out}, {out.with_suffix('.png')}")
    return recipe


@dataclass(frozen=True)
class Problem:
    """errors [R, L, G, H or 1]: what a cell adds to the squared error, at the rungs that have a price. costs [R]. edges: of
    each range, in shares of the denoising, rounded down so that a step begins in its range. heads: of a layer. peaks [L, G,
    H or 1, 3]: a cell's largest magnitudes of Q, K and V, over all prompts; None where some prompt has none."""

    rungs: list[str]
    errors: np.ndarray
    costs: np.ndarray
    edges: list[tuple[float, float]]
    heads: int
    peaks: np.ndarray | None

    @classmethod
    def of(cls, measured: Sequence[Measured], names: Sequence[str], costs: Costs, ranges: Sequence[range], steps: int,
           by_head: bool) -> Problem:
        """The mean of what prompts add; exact adds nothing."""
        mean = np.mean([one.weighed() for one in measured], axis=0)
        of = {**{name: mean[number] for number, name in enumerate(names)}, "exact": np.zeros_like(mean[0])}
        rungs = list(costs.of)
        errors = np.stack([of[rung] for rung in rungs])
        share = lambda step: step * 10**STEP_DIGITS // steps / 10**STEP_DIGITS
        edges = [(share(one.start), share(one.stop)) for one in ranges]
        errors = errors if by_head else errors.sum(-1, keepdims=True)
        peaks = None if any(one.peaks is None for one in measured) else np.max([one.peaks for one in measured], axis=0)
        peaks = peaks if by_head or peaks is None else peaks.max(2, keepdims=True)
        return cls(rungs, errors, np.array([costs.of[rung] for rung in rungs]), edges, mean.shape[-1], peaks)

    def _shares(self) -> np.ndarray:
        """[L, G, H or 1], of all time."""
        lengths = np.array([end - start for start, end in self.edges])
        whole = np.broadcast_to(lengths[None, :, None], self.errors.shape[1:])
        return whole / whole.sum()

    def solve(self, budget: Budget) -> Allocation:
        """As `solve.solve`."""
        return solve(self.errors.reshape(len(self.rungs), -1), self.costs, self._shares().reshape(-1), budget)

    def error_of(self, rungs: np.ndarray) -> float:
        """What an allocation adds to the squared error. rungs [cells]: indices, as an Allocation has them."""
        return float(self.errors.reshape(len(self.rungs), -1)[rungs, np.arange(len(rungs))].sum())

    def by_scales(self, budget: Budget | None) -> Allocation:
        """By the rule of `scales`, with what it errs by the measurement, and the curve of what the measurement would choose."""
        shares = self._shares().reshape(-1)
        rungs = scales.choose(self.peaks.reshape(-1, 3), shares, self.costs, None if budget is None else budget.bits)
        curve = self.solve(Budget(bits=math.inf)).curve
        return Allocation(rungs, float(shares @ self.costs[rungs]), self.error_of(rungs), curve)

    def uniform(self) -> dict[str, tuple[float, float]]:
        """(cost, squared error) of each rung everywhere."""
        return {rung: (float(self.costs[r]), float(self.errors[r].sum())) for r, rung in enumerate(self.rungs)}

    def names(self, allocation: Allocation) -> np.ndarray:
        """[L, G, H], the rung of each head."""
        chosen = np.array(self.rungs)[allocation.rungs].reshape(self.errors.shape[1:])
        return np.broadcast_to(chosen, (*chosen.shape[:2], self.heads))

    def paid(self, allocation: Allocation) -> np.ndarray:
        """[L, G], mean cost."""
        return self.costs[allocation.rungs].reshape(self.errors.shape[1:]).mean(-1)


def rules_of(cells: np.ndarray, layers: Sequence[str], edges: Sequence[tuple[float, float]]) -> list[Rule]:
    """Few rules that give each cell its rung. cells: [L, G, H]. edges: of each range, in shares of the denoising."""
    base = sorted(Counter(cells.reshape(-1).tolist()).items(), key=lambda item: (-item[1], item[0]))[0][0]
    met: dict[tuple, list[str]] = {}
    for layer, rows in zip(layers, cells):
        begin = 0
        for end in range(1, len(edges) + 1):
            if end < len(edges) and (rows[end] == rows[begin]).all():
                continue
            for rung in sorted(set(rows[begin].tolist()) - {base}):
                heads = tuple(int(head) for head in np.flatnonzero(rows[begin] == rung))
                steps = (edges[begin][0], edges[end - 1][1])
                met.setdefault((steps, None if len(heads) == len(rows[begin]) else heads, rung), []).append(layer)
            begin = end
    rules = [Rule(rung, tuple(named) if len(named) < len(layers) else ("*",), heads, steps)
             for (steps, heads, rung), named in met.items()]
    return [Rule(base), *rules]


def _rungs(pipe, prompt, settings, seed, plan, by_bits, speed, say) -> tuple[list[str], Costs, list[str]]:
    """The rungs to choose from, what they cost, and why there are no others, which is said; known before any is measured."""
    tokens, text, head_dim = (0, 0, 0) if by_bits else look(pipe, prompt, settings, seed, Progress(["look"], say))
    why_not = plan.pooled.why_not(tokens, by_bits)
    rungs = list(dict.fromkeys((*plan.rungs, *(() if why_not else plan.pooled.rungs(tokens, text)))))
    costs = bits_of(rungs) if by_bits else costs_of(rungs, tokens, head_dim, speed)
    lacks = "without bits" if by_bits else "not priced"
    left_out = [*[why_not] * bool(why_not), *(f"{lacks}, so not chosen: {rung}" for rung in costs.lacking)]
    for reason in left_out:
        say(reason)
    return list(costs.of), costs, left_out


def _check(pipe, prompt, recipe, settings, seed, progress, say) -> float:
    """The error of the final latent in dB, of a prompt that was not measured."""
    clock = StepClock(progress)
    exact = latents_of(pipe, prompt, settings, seed, clock, None, "check", f"exact: {prompt[:60]}")
    error = db(relative_error(latents_of(pipe, prompt, settings, seed, clock, recipe, "check", "the recipe"), exact))
    say(f"found: {error:.1f} dB, held-out prompt: {prompt}")
    return round(error, 2)


def check_budget(budget: Budget | None, scheme: str) -> None:
    """Raises ValueError for a budget that a scheme does not take."""
    if scheme == "seed" and budget is not None and budget.bits is None:
        raise ValueError(f"budget is {budget}; the scheme \"seed\" knows no error and no time: give bits such as 6bit, or none")
    if scheme == "measured" and budget is None:
        raise ValueError("no budget; give one such as 45dB, 1.1x or 6bit")


def _goal(scheme: str, budget: Budget | None) -> str:
    if scheme == "measured":
        return str(budget)
    return "its sizes of Q, K and V, " + ("thresholds as they are" if budget is None else f"thresholds moved for {budget}")


def _about(prompts, seed, settings, device, order, goal, allocation, spread, costs, left_out, found) -> dict[str, Any]:
    where = environment()
    return {"title": f"calibrated for {goal}", "model": settings.model, "prompts": list(prompts), "seed": seed,
            "steps": settings.steps, "order": order,
            "metric": "squared error of the final latent, in dB of its energy", "budget": goal,
            "predicted_error_db": round(db(allocation.error), 2),
            "predicted_spread_db": [round(spread[0], 2), round(spread[-1], 2)], "predicted_cost": round(allocation.cost, 4),
            **({"found_error_db": found} if found else {}), "cost_table": costs.said,
            "rungs": [f"{rung}: {cost:.3g}" for rung, cost in costs.of.items()], **({"left_out": left_out} if left_out else {}),
            "hardware": f"measured on {where['machine']}, {device}",
            "versions": [f"{name} {version}" for name, version in where["versions"].items()], "commit": str(where["commit"])}


def _file(folder: Path, prompt: str, seed: int, settings: Settings, plan: Plan, rungs: Sequence[str], order: str) -> Path:
    """Where a prompt's measurement is kept; of other settings another file."""
    about = {**asdict(plan), "rungs": list(rungs), "by_head": None, "pooled": None, "scheme": None, "order": order,
             **settings.as_dict(), "fps": None, "model": Path(settings.model).name}
    key = json.dumps([prompt, seed, about], sort_keys=True)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"


def _save(file: Path, measured: Measured) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(file) as part, open(part, "wb") as opened:
        np.savez(opened, **{name: value for name, value in asdict(measured).items() if value is not None})


def _load(file: Path) -> Measured:
    with np.load(file, allow_pickle=False) as held:
        return Measured(held["errors"], held["gains"], held.get("peaks"), int(held["tokens"]), int(held["head_dim"]))
