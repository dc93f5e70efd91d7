"""Flicker: how much neighbouring frames differ, in grey levels; motion counts too, so read it beside the exact run's."""
from __future__ import annotations

import numpy as np

from ..video import UINT8_MAX, BadVideoError, as_video

NAME = "flicker"
LABEL = "flicker"
UNIT = "levels"
DIGITS = 2
HIGHER_IS_BETTER = False
KIND = "alone"
PLACE = 100


def flicker(video) -> float:
    """Mean absolute difference of neighbouring frames, in levels of 255.

    Args:
        video: [F, H, W, 3], F >= 2, uint8 or float in [0, 1].

    Raises:
        BadVideoError: see `video.as_video`; or fewer than two frames.

    Source: VBench's temporal flickering is (255 - this) / 255.
    """
    video = as_video(video)
    if len(video) < 2:
        raise BadVideoError(f"flicker needs at least 2 frames, the video has {len(video)}")
    return float(np.abs(np.diff(video, axis=0)).mean() * UINT8_MAX)


def measure(video, reference=None, context=None) -> float:
    """The metric's one figure for a video."""
    return flicker(video)
