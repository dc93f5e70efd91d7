"""Peak signal-to-noise ratio of a video against its paired reference, per frame."""
from __future__ import annotations

import numpy as np

from .shared.device import PIXELS, as_array, at_work, blocks, device_of

NAME = "psnr"
LABEL = "PSNR"
UNIT = "dB"
DIGITS = 1
HIGHER_IS_BETTER = True
KIND = "paired"
PLACE = 10
CEILING_DB = 160.0  # identical frames have no error; a finite ceiling (float32 rounding) keeps means finite
PERFECT = CEILING_DB


def psnr(video, reference, device=None) -> np.ndarray:
    """PSNR of each frame, over its pixels and channels, for a peak of 1.

    Args:
        video, reference: [F, H, W, 3], uint8 or float in [0, 1].
        device: a `shared.device.Device`, or None for NumPy.

    Returns:
        float64 [F], dB, at most `CEILING_DB` (reached by identical frames).

    Raises:
        BadVideoError: see `video.checked_pair`.
    """
    with at_work(device):
        mean_square = np.concatenate([as_array(_square(a - b).mean(PIXELS)) for a, b in blocks(video, reference, device)])
    return -10.0 * np.log10(np.maximum(mean_square, 10.0 ** (-CEILING_DB / 10.0)))


def _square(apart):
    return apart * apart


def per_frame(video, reference, context=None) -> np.ndarray:
    """The figures of a pair's frames, [F]."""
    return psnr(video, reference, device_of(context))


def loss(value):
    """The error behind a PSNR: root mean square, in units of the peak. What "x times the floor" divides."""
    return 10.0 ** (-np.asarray(value) / 20.0)
