"""Multi-scale structural similarity of a video with its paired reference, per frame."""
from __future__ import annotations

import numpy as np

from ..video import BadVideoError, as_pair
from .ssim import WINDOW, similarity

NAME = "ms_ssim"
LABEL = "MS-SSIM"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = True
KIND = "paired"
PLACE = 30
PERFECT = 1.0
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first


def scales_for(height: int, width: int) -> int:
    """How many of the five scales a frame of this size can carry: each halves it, and a window must still fit."""
    return sum(min(height, width) // 2**level >= WINDOW for level in range(len(WEIGHTS)))


def halve(image: np.ndarray) -> np.ndarray:
    """Mean of 2x2 pixels, an odd last row or column left out: [H, W, C] -> [H // 2, W // 2, C]."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    return image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1).mean(axis=(1, 3))


def ms_ssim(video, reference) -> np.ndarray:
    """MS-SSIM of each frame, over as many of the five scales as the frame's size carries.

    Frames under 176 pixels use fewer scales, with the weights of those scales made to sum to 1 (128 pixels: four).

    Args:
        video, reference: [F, H, W, 3], uint8 or float in [0, 1]; H and W at least 11.

    Returns:
        float64 [F], 1 for identical frames.

    Raises:
        BadVideoError: see `video.as_pair`; or a frame smaller than the window.

    Source: Wang, Simoncelli, Bovik 2003; a negative contrast term counts as 0, as torchmetrics does.
    """
    video, reference = as_pair(video, reference)
    scales = scales_for(*video.shape[1:3])
    if not scales:
        size = "x".join(map(str, video.shape[1:3]))
        raise BadVideoError(f"ms_ssim needs frames of at least {WINDOW}x{WINDOW} pixels, these are {size}")
    weights = np.array(WEIGHTS[:scales]) / sum(WEIGHTS[:scales])
    out = np.empty(len(video))
    for i, (a, b) in enumerate(zip(video, reference)):
        terms = []
        for level in range(scales):
            whole, contrast = similarity(a, b)
            terms.append(max(whole if level == scales - 1 else contrast, 0.0))
            if level < scales - 1:
                a, b = halve(a), halve(b)
        out[i] = np.prod(np.power(terms, weights))
    return out


def measure(video, reference=None, context=None) -> float:
    """The metric's one figure for a pair: the mean over frames."""
    return float(ms_ssim(video, reference).mean())
