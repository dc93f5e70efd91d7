"""Dynamic degree: how fast the fastest things move. Neither direction is better; a video that lost its motion shows here."""
from __future__ import annotations

import numpy as np

from .shared.flow import pair_flows

NAME = "dynamic_degree"
LABEL = "dynamic degree"
UNIT = "% of side/frame"
DIGITS = 2
HIGHER_IS_BETTER = None
KIND = "alone"
PLACE = 130
NEEDS = ("skimage", "scipy")
FASTEST_SHARE = 0.05  # VBench looks at the top 5 % of flow magnitudes


def dynamic_degree(video, cache: dict | None = None) -> float:
    """Mean magnitude of the fastest 5 % of the optical flow, in percent of the short side a frame.

    Args:
        video: [F, H, W, 3], F >= 2, uint8 or float in [0, 1].
        cache: flows shared between the metrics of one video.

    Raises:
        BadVideoError: see `video.as_video`; or fewer than two frames.

    Source: VBench's dynamic degree, as a figure instead of a threshold, with TV-L1 in place of RAFT.
    """
    speeds = []
    for pair in pair_flows(video, cache):
        magnitude = np.sort(np.hypot(*pair.forward), axis=None)
        fastest = magnitude[-max(1, int(FASTEST_SHARE * magnitude.size)) :]
        speeds.append(100.0 * fastest.mean() / min(pair.first.shape))
    return float(np.mean(speeds))


def measure(video, reference=None, context=None) -> float:
    """The metric's one figure for a video."""
    return dynamic_degree(video, context.cache if context else None)
