"""Relative L1 error of an attention output: the sum of absolute errors beside the sum of absolute values."""
from __future__ import annotations

import numpy as np

from .shared.tensor import as_arrays, ratio

NAME = "relative_l1"
LABEL = "relative L1"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = False
KIND = "tensor"
PLACE = 30
PERFECT = 0.0


def measure(output, reference, axis=None) -> np.ndarray:
    """sum |output - reference| / sum |reference| over `axis` (None: all).

    Raises:
        BadTensorError: see `tensor.as_arrays`.

    Source: the "Relative L1" of the SageAttention papers.
    """
    output, reference = as_arrays(output, reference)
    return ratio(np.abs(output - reference).sum(axis=axis), np.abs(reference).sum(axis=axis))
