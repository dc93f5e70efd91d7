"""Root mean square error of an attention output, in the output's own units."""
from __future__ import annotations

import numpy as np

from .shared.tensor import as_arrays

NAME = "rmse"
LABEL = "RMSE"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = False
KIND = "tensor"
PLACE = 40
PERFECT = 0.0


def measure(output, reference, axis=None) -> np.ndarray:
    """sqrt(mean (output - reference)^2) over `axis` (None: all).

    Raises:
        BadTensorError: see `tensor.as_arrays`.
    """
    output, reference = as_arrays(output, reference)
    return np.sqrt(np.square(output - reference).mean(axis=axis))
