"""Which rung each cell gets: the least error for a cost, or the least cost for an error.

A cell (layer, range of steps, head) is one choice; errors add up, and so do costs. Of each cell's rungs those on the lower
convex hull of error over cost are kept; all cells begin at their cheapest rung, and the step that takes away most error for
its cost is made next (Lagrangian relaxation; between two of these points nothing better is looked for).
Source: Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988 (the hull; own code).
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MOST_DB = 200.0
"""What no error at all counts as."""


@dataclass(frozen=True)
class Budget:
    """error_db: at least so many dB of the final latent's energy over its error; or cost: at most so many times int8+fp8's; or
    bits: at most so many of Q and K in the mean, which is then what rungs cost."""

    error_db: float | None = None
    cost: float | None = None
    bits: float | None = None

    @property
    def most(self) -> float | None:
        """The largest cost; None where the error is bounded."""
        return self.cost if self.bits is None else self.bits

    @property
    def unit(self) -> str:
        """Of the largest cost."""
        return "x" if self.bits is None else "bit"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """"45dB", "1.1x" or "6bit". Raises ValueError for anything else."""
        found = re.fullmatch(r"\s*(\d+\.?\d*)\s*(dB|x|bit)\s*", text)
        if found is None or not float(found[1]):
            raise ValueError(f"budget is {text!r}; give decibels of the final latent such as 45dB, times int8+fp8's time in "
                             "attention such as 1.1x, or bits of Q and K in the mean such as 6bit")
        return cls(**{{"dB": "error_db", "x": "cost", "bit": "bits"}[found[2]]: float(found[1])})

    def __str__(self) -> str:
        return f"{self.error_db:g}dB" if self.most is None else f"{self.most:g}{self.unit}"


@dataclass(frozen=True)
class Allocation:
    """rungs [cells]: indices. cost: of all, in int8+fp8's or in bits. error: squared, relative. curve: (cost, error), cheapest
    first."""

    rungs: np.ndarray
    cost: float
    error: float
    curve: list[tuple[float, float]]


def db(error: float) -> float:
    """A squared relative error in dB."""
    return MOST_DB if error <= 0 else min(MOST_DB, -10 * math.log10(error))


def check_cost(budget: Budget | None, costs: Iterable[float]) -> None:
    """Raises ValueError for a budget that the cheapest rung exceeds, so that no choice meets it. costs: [R], of a rung."""
    least = min(costs)
    if budget is not None and budget.most is not None and not _meets(budget, least, 0.0):
        raise ValueError(f"a budget of {budget} cannot be met: these rungs give at least {least:.3g}{budget.unit}, the "
                         "cheapest of them everywhere; name cheaper ones, or raise the budget")


def solve(errors: np.ndarray, costs: np.ndarray, shares: np.ndarray, budget: Budget) -> Allocation:
    """The allocation for a budget.

    errors: [R, cells], what a cell at a rung adds to the squared error. costs: [R], of a rung. shares: [cells], of all time;
        they sum to 1. The same input gives the same allocation.
    Raises ValueError for a budget that cannot be met, with what can.
    """
    check_cost(budget, costs)
    hulls = [_hull(costs, errors[:, cell]) for cell in range(errors.shape[1])]
    rungs = np.array([hull[0] for hull in hulls])
    cost, error = float(shares @ costs[rungs]), float(errors[rungs, np.arange(len(rungs))].sum())
    steps = []
    for cell, hull in enumerate(hulls):
        for before, after in zip(hull, hull[1:]):
            gained, paid = errors[before, cell] - errors[after, cell], shares[cell] * (costs[after] - costs[before])
            steps.append((-gained / paid, len(steps), cell, after, gained, paid))
    curve = [(cost, max(error, 0.0))]
    done = rungs.copy() if _meets(budget, cost, error) else None
    at = 0
    for _, _, cell, after, gained, paid in sorted(steps):
        if done is not None and budget.error_db is not None:
            break
        rungs[cell], cost, error = after, cost + paid, max(error - gained, 0.0)
        curve.append((cost, error))
        if _meets(budget, cost, error):
            done, at = rungs.copy(), len(curve) - 1
    if done is None:
        raise ValueError(f"a budget of {budget} cannot be met: these rungs give at most {db(curve[-1][1]):.1f} dB; name finer "
                         "ones, or lower the budget")
    for _, _, _, _, gained, paid in sorted(steps)[len(curve) - 1:]:
        curve.append((curve[-1][0] + paid, max(curve[-1][1] - gained, 0.0)))
    return Allocation(done, float(curve[at][0]), float(curve[at][1]), curve)


def _meets(budget: Budget, cost: float, error: float) -> bool:
    return cost <= budget.most * (1 + 1e-9) if budget.error_db is None else db(error) >= budget.error_db


def _hull(costs: np.ndarray, errors: np.ndarray) -> list[int]:
    """The rungs on the lower convex hull of error over cost, cheapest first, each better than the one before."""
    kept: list[int] = []
    for rung in sorted(range(len(costs)), key=lambda rung: (costs[rung], errors[rung], rung)):
        if kept and errors[rung] >= errors[kept[-1]]:
            continue
        slope = lambda a, b: (errors[a] - errors[b]) / (costs[b] - costs[a])
        while len(kept) > 1 and slope(kept[-2], kept[-1]) <= slope(kept[-1], rung):
            kept.pop()
        kept.append(rung)
    return kept
