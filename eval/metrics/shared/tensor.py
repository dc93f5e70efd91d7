"""What the kernel-level metrics share: a pair of arrays, checked by name, and the axes a figure is taken over."""
from __future__ import annotations

import numpy as np


class BadTensorError(ValueError):
    """A pair of arrays no kernel-level metric can compare."""


def as_arrays(output, reference) -> tuple[np.ndarray, np.ndarray]:
    """Check an output and its reference: float64 arrays of one shape.

    Raises:
        BadTensorError: shapes differ, empty, or NaN or inf in either (named, counted).
    """
    output, reference = np.asarray(output, np.float64), np.asarray(reference, np.float64)
    if output.shape != reference.shape:
        raise BadTensorError(f"output is {output.shape} but reference is {reference.shape}; the shapes must be equal")
    if not output.size:
        raise BadTensorError(f"output and reference are empty: shape {output.shape}")
    for name, array in (("output", output), ("reference", reference)):
        bad = int(array.size - np.isfinite(array).sum())
        if bad:
            raise BadTensorError(f"{name} holds {bad} values that are NaN or inf")
    return output, reference


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, where 0 / 0 is 0 and x / 0 is inf."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(top == 0, 0.0, np.divide(top, bottom))
