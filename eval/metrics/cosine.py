"""Cosine similarity of an attention output with the exact one."""
from __future__ import annotations

import numpy as np

from .shared.tensor import as_arrays

NAME = "cosine"
LABEL = "cosine"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = True
KIND = "tensor"
PLACE = 20
PERFECT = 1.0


def measure(output, reference, axis=None) -> np.ndarray:
    """<output, reference> / (|output| |reference|) over `axis` (None: all); two zero arrays give 1, one gives 0.

    Raises:
        BadTensorError: see `tensor.as_arrays`.
    """
    output, reference = as_arrays(output, reference)
    product = (output * reference).sum(axis=axis)
    norms = np.sqrt(np.square(output).sum(axis=axis) * np.square(reference).sum(axis=axis))
    equal = np.square(output - reference).sum(axis=axis) == 0
    return np.where(equal, 1.0, product / np.where(norms == 0, 1.0, norms))
