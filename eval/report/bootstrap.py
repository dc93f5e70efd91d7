"""Bootstrap intervals over prompts: how far a mean could move had other prompts been drawn."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 20260101  # a fixed seed: the same results give the same intervals


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; `low` and `high` are NaN with fewer than two prompts."""

    value: float
    low: float
    high: float
    prompts: int


def draws(prompts: int) -> np.ndarray:
    """Indices of RESAMPLES draws of `prompts` prompts with replacement: [RESAMPLES, prompts]."""
    return np.random.default_rng(SEED).integers(0, prompts, (RESAMPLES, prompts))


def bootstrap(statistic: Callable[..., np.ndarray], *columns) -> Interval:
    """The percentile interval of a statistic of per-prompt values.

    Args:
        statistic: takes one array [..., prompts] for each column and reduces the last axis.
        columns: per-prompt values, one array [prompts] each (mean over seeds first: seeds of a prompt are not independent).

    Raises:
        ValueError: no prompts, or columns of different lengths.
    """
    arrays = [np.asarray(column, np.float64) for column in columns]
    if not arrays or arrays[0].ndim != 1 or not arrays[0].size or any(a.shape != arrays[0].shape for a in arrays):
        raise ValueError(f"bootstrap needs columns of one length >= 1, got shapes {[a.shape for a in arrays]}")
    count = arrays[0].size
    value = float(statistic(*arrays))
    if count < 2:
        return Interval(value, float("nan"), float("nan"), count)
    picks = draws(count)
    spread = statistic(*[array[picks] for array in arrays])
    method = "linear" if np.isfinite(spread).all() else "nearest"  # between two infinities there is nothing to interpolate
    low, high = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method=method)
    return Interval(value, float(low), float(high), count)


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over prompts."""
    return values.mean(axis=-1)


def ratio_of_means(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """mean(top) / mean(bottom) over prompts; 0 / 0 is 1, x / 0 is inf."""
    top, bottom = top.mean(axis=-1), bottom.mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((top == 0) & (bottom == 0), 1.0, top / bottom)
