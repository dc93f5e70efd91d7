"""Signal to quantisation noise ratio of an attention output."""
from __future__ import annotations

import numpy as np

from .shared.tensor import as_arrays

NAME = "sqnr"
LABEL = "SQNR"
UNIT = "dB"
DIGITS = 1
HIGHER_IS_BETTER = True
KIND = "tensor"
PLACE = 10
CEILING_DB = 200.0  # identical arrays have no noise; a finite ceiling keeps means finite
PERFECT = CEILING_DB


def measure(output, reference, axis=None) -> np.ndarray:
    """10 log10(sum reference^2 / sum (output - reference)^2) over `axis` (None: all), within +-CEILING_DB.

    Raises:
        BadTensorError: see `tensor.as_arrays`.
    """
    output, reference = as_arrays(output, reference)
    signal, noise = np.square(reference).sum(axis=axis), np.square(output - reference).sum(axis=axis)
    tiny = np.finfo(np.float64).tiny
    db = 10.0 * (np.log10(np.maximum(signal, tiny)) - np.log10(np.maximum(noise, tiny)))
    return np.where(noise == 0, CEILING_DB, np.clip(db, -CEILING_DB, CEILING_DB))
