"""The scheme "seed": a layer's or a head's bit width by how large its Q, K and V are, with no look at the error.

A tensor's scale is its largest magnitude over 127, what INT8 would round to; the mean of Q's, K's and V's above one threshold
means full precision, above another INT8, else INT4.
Source: `sageattn_multi_precision` of github.com/Charles2530/lowbit_quant_fa2_paddle (src/core.py, `select_quantization`: rule
and thresholds; own code). There the rule is asked at every call, for the call's whole tensors; here it is asked once for each
layer and range of steps, or for each of its heads, and thresholds may be moved together so that a budget of bits is met.
"""
from __future__ import annotations

import numpy as np

RUNGS = ("exact", "int8+fp16", "int4+fp16")
"""What the rule chooses among, from large to small."""
THRESHOLDS = (0.2, 0.05)
"""Scales above which a cell gets the first of RUNGS, and the second."""
MAX_CODE = 127
SLACK = 1e-9


def rungs_of(scales: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """The index in RUNGS of each cell. scales: of any shape. factor: of both thresholds."""
    return sum((scales <= threshold * factor).astype(int) for threshold in THRESHOLDS)


def scales_of(peaks: np.ndarray) -> np.ndarray:
    """A cell's scale. peaks: [..., 3], largest magnitudes of Q, K and V."""
    return peaks.mean(-1) / MAX_CODE


def choose(peaks: np.ndarray, shares: np.ndarray, bits: np.ndarray, most: float | None = None) -> np.ndarray:
    """The index in RUNGS of each cell, [cells].

    peaks: [cells, 3], as `scales_of`. shares: [cells], of all time; they sum to 1. bits: [3], of each of RUNGS. most: bits that
        cells may have in the mean: thresholds are moved by the factor with which they come nearest; None leaves them.
    Raises ValueError for fewer bits than the last rung has.
    """
    scales = scales_of(peaks)
    if most is None:
        return rungs_of(scales)
    factors = np.unique(np.outer(scales, 1 / np.array(THRESHOLDS)))  # where a cell changes its rung
    for factor in (0.0, *factors):
        rungs = rungs_of(scales, factor * (1 + SLACK))
        if shares @ bits[rungs] <= most * (1 + SLACK):
            return rungs
    raise ValueError(f"a budget of {most:g}bit cannot be met: {RUNGS[-1]} everywhere has {bits[-1]:g} bits")
