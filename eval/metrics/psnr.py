"""Peak signal-to-noise ratio of a video against its paired reference, per frame."""
from __future__ import annotations

import numpy as np

from ..video import as_pair

NAME = "psnr"
LABEL = "PSNR"
UNIT = "dB"
DIGITS = 1
HIGHER_IS_BETTER = True
KIND = "paired"
PLACE = 10
CEILING_DB = 160.0  # identical frames have no error; a finite ceiling (float32 rounding) keeps means finite
PERFECT = CEILING_DB


def psnr(video, reference) -> np.ndarray:
    """PSNR of each frame, over its pixels and channels, for a peak of 1.

    Args:
        video, reference: [F, H, W, 3], uint8 or float in [0, 1].

    Returns:
        float64 [F], dB, at most `CEILING_DB` (reached by identical frames).

    Raises:
        BadVideoError: see `video.as_pair`.
    """
    video, reference = as_pair(video, reference)
    mean_square = np.mean(np.square(video - reference), axis=(1, 2, 3))
    return -10.0 * np.log10(np.maximum(mean_square, 10.0 ** (-CEILING_DB / 10.0)))


def per_frame(video, reference, context=None) -> np.ndarray:
    """The figures of a pair's frames, [F]."""
    return psnr(video, reference)


def loss(value):
    """The error behind a PSNR: root mean square, in units of the peak. What "x times the floor" divides."""
    return 10.0 ** (-np.asarray(value) / 20.0)
