"""Optical flow for the temporal metrics: a few frame pairs of a clip, forward and backward, from scikit-image's TV-L1."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...video import BadVideoError, as_video, luma

FLOW_SIDE = 192  # pixels; larger frames are averaged down to at most twice this before the flow
MAX_PAIRS = 6  # neighbouring pairs looked at in one clip, evenly spread


@dataclass(frozen=True)
class FramePair:
    """Two neighbouring frames and the flow between them.

    first, second: luma [H, W]. forward, backward: flow in pixels a frame, [2, H, W] as (rows, columns);
    `forward` lives on first's grid and points into second, `backward` the other way.
    """

    first: np.ndarray
    second: np.ndarray
    forward: np.ndarray
    backward: np.ndarray


def shrink(frames: np.ndarray, side: int = FLOW_SIDE) -> np.ndarray:
    """Average [F, H, W] over whole blocks so that the short side is below twice `side`."""
    factor = max(1, min(frames.shape[1:]) // side)
    height, width = frames.shape[1] // factor, frames.shape[2] // factor
    blocks = frames[:, : height * factor, : width * factor].reshape(-1, height, factor, width, factor)
    return blocks.mean(axis=(2, 4))


def flow_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """TV-L1 flow [2, H, W] (rows, columns; pixels): second[p + flow(p)] looks like first[p].

    Source: scikit-image `optical_flow_tvl1` (Zach, Pock, Bischof 2007), five warps.
    """
    from skimage.registration import optical_flow_tvl1

    return optical_flow_tvl1(first.astype(np.float32), second.astype(np.float32), num_warp=5, dtype=np.float32)


def warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Sample `image` [H, W] at p + flow(p), bilinear, edges repeated."""
    from scipy.ndimage import map_coordinates

    grid = np.mgrid[: image.shape[0], : image.shape[1]]
    return map_coordinates(image, grid + flow, order=1, mode="nearest")


def spread(count: int, most: int = MAX_PAIRS) -> np.ndarray:
    """At most `most` indices evenly spread over range(count)."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def pair_flows(video, cache: dict | None = None) -> list[FramePair]:
    """Flow of at most MAX_PAIRS neighbouring frame pairs of a clip [F, H, W, 3]; kept in `cache` for the next metric.

    Raises:
        BadVideoError: see `video.as_video`; or fewer than two frames.
    """
    if cache is not None and "pair_flows" in cache:
        return cache["pair_flows"]
    gray = shrink(luma(as_video(video)))
    if len(gray) < 2:
        raise BadVideoError(f"a temporal metric needs at least 2 frames, the video has {len(gray)}")
    pairs = []
    for i in spread(len(gray) - 1):
        first, second = gray[i], gray[i + 1]
        pairs.append(FramePair(first, second, flow_between(first, second), flow_between(second, first)))
    if cache is not None:
        cache["pair_flows"] = pairs
    return pairs
