"""The largest absolute error of an attention output: one bad row that means would hide."""
from __future__ import annotations

import numpy as np

from .shared.tensor import as_arrays

NAME = "max_error"
LABEL = "max error"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = False
KIND = "tensor"
PLACE = 50
PERFECT = 0.0
REDUCE = np.max


def measure(output, reference, axis=None) -> np.ndarray:
    """max |output - reference| over `axis` (None: all).

    Raises:
        BadTensorError: see `tensor.as_arrays`.
    """
    output, reference = as_arrays(output, reference)
    return np.abs(output - reference).max(axis=axis)
