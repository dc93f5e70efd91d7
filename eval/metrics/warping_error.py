"""Warping error: what is left of the difference between neighbouring frames once motion is taken out by optical flow."""
from __future__ import annotations

import numpy as np

from .shared.flow import pair_flows, warp

NAME = "warping_error"
LABEL = "warping error"
UNIT = "1e-3"
DIGITS = 3
HIGHER_IS_BETTER = False
KIND = "alone"
PLACE = 110
NEEDS = ("skimage", "scipy")
MILLI = 1e3  # mean squares of pictures in [0, 1] are small; the figure is in thousandths


def visible(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Pixels [H, W] that the other frame shows as well: forward and backward flow cancel.

    Source: Sundaram, Brox, Keutzer 2010, with their constants 0.01 and 0.5.
    """
    returned = np.stack([warp(component, forward) for component in backward])
    gap = np.square(forward + returned).sum(axis=0)
    size = np.square(forward).sum(axis=0) + np.square(returned).sum(axis=0)
    return gap < 0.01 * size + 0.5


def warping_error(video, cache: dict | None = None) -> float:
    """Mean squared luma difference between a frame and its neighbour warped onto it, visible pixels only, times 1e3.

    Args:
        video: [F, H, W, 3], F >= 2, uint8 or float in [0, 1].
        cache: flows shared between the metrics of one video.

    Raises:
        BadVideoError: see `video.as_video`; or fewer than two frames.

    Source: Lai et al. 2018, "Learning blind video temporal consistency", section 4; TV-L1 flow of the video itself.
    """
    errors = []
    for pair in pair_flows(video, cache):
        seen = visible(pair.forward, pair.backward)
        if seen.any():
            errors.append(np.square(pair.first - warp(pair.second, pair.forward))[seen].mean())
    return float(np.mean(errors) * MILLI) if errors else 0.0


def measure(video, reference=None, context=None) -> float:
    """The metric's one figure for a video."""
    return warping_error(video, context.cache if context else None)
