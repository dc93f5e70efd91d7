"""Structural similarity of a video with its paired reference, per frame."""
from __future__ import annotations

import numpy as np

from ..video import BadVideoError, as_pair

NAME = "ssim"
LABEL = "SSIM"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = True
KIND = "paired"
PLACE = 20
PERFECT = 1.0
WINDOW = 11  # pixels; Wang et al.'s Gaussian window
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03  # stabilisers for a peak of 1


def gaussian_taps() -> np.ndarray:
    """The window's one-dimensional weights, [WINDOW], sum 1."""
    offset = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-0.5 * np.square(offset / SIGMA))
    return taps / taps.sum()


def blur(image: np.ndarray) -> np.ndarray:
    """Gaussian window over the two leading axes, whole windows only: [H, W, ...] -> [H - 10, W - 10, ...]."""
    taps = gaussian_taps()
    rows = image.shape[0] - WINDOW + 1
    columns = image.shape[1] - WINDOW + 1
    image = sum(weight * image[i : i + rows] for i, weight in enumerate(taps))
    return sum(weight * image[:, i : i + columns] for i, weight in enumerate(taps))


def similarity(frame: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """SSIM and its contrast-structure part of one frame [H, W, 3], means over windows and channels."""
    mean_a, mean_b = blur(frame), blur(reference)
    var_a = blur(frame * frame) - mean_a * mean_a
    var_b = blur(reference * reference) - mean_b * mean_b
    covariance = blur(frame * reference) - mean_a * mean_b
    c1, c2 = K1 * K1, K2 * K2
    contrast = (2 * covariance + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return float(np.mean(luminance * contrast)), float(np.mean(contrast))


def ssim(video, reference) -> np.ndarray:
    """SSIM of each frame: mean over whole 11x11 Gaussian windows and the three channels.

    Args:
        video, reference: [F, H, W, 3], uint8 or float in [0, 1]; H and W at least 11.

    Returns:
        float64 [F], 1 for identical frames.

    Raises:
        BadVideoError: see `video.as_pair`; or a frame smaller than the window.

    Source: Wang et al. 2004, sections III-B and III-C; population variance, data range 1.
    """
    video, reference = as_pair(video, reference)
    if min(video.shape[1:3]) < WINDOW:
        size = "x".join(map(str, video.shape[1:3]))
        raise BadVideoError(f"ssim needs frames of at least {WINDOW}x{WINDOW} pixels, these are {size}")
    return np.array([similarity(a, b)[0] for a, b in zip(video, reference)])


def per_frame(video, reference, context=None) -> np.ndarray:
    """The figures of a pair's frames, [F]."""
    return ssim(video, reference)
