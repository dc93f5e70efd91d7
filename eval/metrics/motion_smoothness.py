"""Motion smoothness: how well the middle of three frames is foretold by the two around it."""
from __future__ import annotations

import numpy as np

from ..video import BadVideoError, as_video, luma
from .shared.flow import flow_between, shrink, spread, warp

NAME = "motion_smoothness"
LABEL = "motion smoothness"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = True
KIND = "alone"
PLACE = 120
NEEDS = ("skimage", "scipy")
PERFECT = 1.0


def motion_smoothness(video) -> float:
    """1 minus the mean absolute luma error of middle frames interpolated along the flow between their neighbours.

    Args:
        video: [F, H, W, 3], F >= 3, uint8 or float in [0, 1].

    Raises:
        BadVideoError: see `video.as_video`; or fewer than three frames.

    Source: VBench's motion smoothness; theirs interpolates with the AMT network, ours halves TV-L1 flow.
    """
    gray = shrink(luma(as_video(video)))
    if len(gray) < 3:
        raise BadVideoError(f"motion_smoothness needs at least 3 frames, the video has {len(gray)}")
    errors = []
    for i in spread(len(gray) - 2):
        before, middle, after = gray[i : i + 3]
        half = flow_between(before, after) / 2  # taken at the middle frame: motion is small against the flow's smoothness
        errors.append(np.abs(middle - (warp(before, -half) + warp(after, half)) / 2).mean())
    return float(1.0 - np.mean(errors))


def measure(video, reference=None, context=None) -> float:
    """The metric's one figure for a video."""
    return motion_smoothness(video)
