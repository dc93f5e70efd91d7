"""The largest absolute error of an attention output: one bad row that means would hide."""
from __future__ import annotations

import numpy as np

from .shared.tensor import as_arrays

NAME = "max_error"
UNIT = ""
HIGHER_IS_BETTER = False
KIND = "tensor"
PERFECT = 0.0


def max_error(output, reference, axis=None) -> np.ndarray:
    """max |output - reference| over `axis` (None: all).

    Raises:
        BadTensorError: see `tensor.as_arrays`.
    """
    output, reference = as_arrays(output, reference)
    return np.abs(output - reference).max(axis=axis)
