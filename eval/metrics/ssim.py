"""Structural similarity of a video with its paired reference, per frame."""
from __future__ import annotations

import numpy as np

from ..video import BadVideoError
from .shared.device import PIXELS, as_array, at_work, blocks, device_of

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
STRIP = 32  # rows at once in NumPy: what they take stays in a core's cache


def gaussian_taps() -> np.ndarray:
    """The window's one-dimensional weights, [WINDOW], sum 1."""
    offset = np.arange(WINDOW) - WINDOW // 2
    taps = np.exp(-0.5 * np.square(offset / SIGMA))
    return taps / taps.sum()


def blur(image):
    """Gaussian window over height and width, whole windows only: [..., H, W, C] -> [..., H - 10, W - 10, C]."""
    taps = gaussian_taps().tolist()
    rows = image.shape[-3] - WINDOW + 1
    columns = image.shape[-2] - WINDOW + 1
    image = _sum(weight * image[..., i : i + rows, :, :] for i, weight in enumerate(taps))
    return _sum(weight * image[..., i : i + columns, :] for i, weight in enumerate(taps))


def _sum(parts):
    """The sum of arrays of one's own, the first of which it is written into."""
    total = next(parts)
    for part in parts:
        total += part
    return total


def maps(frame, reference) -> tuple:
    """SSIM and its contrast-structure part at each window and channel of frames [..., H, W, C]."""
    mean_a, mean_b = blur(frame), blur(reference)
    var_a = blur(frame * frame) - mean_a * mean_a
    var_b = blur(reference * reference) - mean_b * mean_b
    covariance = blur(frame * reference) - mean_a * mean_b
    c1, c2 = K1 * K1, K2 * K2
    contrast = (2 * covariance + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return luminance * contrast, contrast


def similarity(frame, reference) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its contrast-structure part of frames [..., H, W, C], means over windows and channels, [...]."""
    if isinstance(frame, np.ndarray):
        rows = [slice(at, at + STRIP + WINDOW - 1) for at in range(0, frame.shape[-3] - WINDOW + 1, STRIP)]
        strips = [maps(frame[..., part, :, :], reference[..., part, :, :]) for part in rows]
        whole = [np.concatenate(parts, -3) for parts in zip(*strips)]
    else:
        whole = maps(frame, reference)
    return tuple(as_array(one.mean(PIXELS)) for one in whole)


def ssim(video, reference, device=None) -> np.ndarray:
    """SSIM of each frame: mean over whole 11x11 Gaussian windows and the three channels.

    Args:
        video, reference: [F, H, W, 3], uint8 or float in [0, 1]; H and W at least 11.
        device: a `shared.device.Device`, or None for NumPy.

    Returns:
        float64 [F], 1 for identical frames.

    Raises:
        BadVideoError: see `video.checked_pair`; or a frame smaller than the window.

    Source: Wang et al. 2004, sections III-B and III-C; population variance, data range 1.
    """
    found = []
    with at_work(device):
        for a, b in blocks(video, reference, device):
            if min(a.shape[1:3]) < WINDOW:
                size = "x".join(map(str, a.shape[1:3]))
                raise BadVideoError(f"ssim needs frames of at least {WINDOW}x{WINDOW} pixels, these are {size}")
            found.append(similarity(a, b)[0])
    return np.concatenate(found)


def per_frame(video, reference, context=None) -> np.ndarray:
    """The figures of a pair's frames, [F]."""
    return ssim(video, reference, device_of(context))
