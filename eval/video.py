"""What a video is to the metrics: frames [F, H, W, 3], checked by name, as float64 in [0, 1].

In float64 a long video takes a quarter of a gigabyte: what can go frame by frame checks it as it came (`checked`,
`checked_pair`) and takes `as_unit` of the frames at work.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from lowbit_video.pipelines.shared import video_files

UINT8_MAX = 255.0
RANGE_SLACK = 1e-4  # how far past [0, 1] float rounding may carry a pixel before we call it a wrong range


class BadVideoError(video_files.BadFramesError):
    """A video a metric cannot read: its shape, dtype or range, the file it came from, or the pair it makes."""


def checked(video, name: str = "video") -> np.ndarray:
    """Check one video and give it as it came.

    Args:
        video: [F, H, W, 3]; uint8 in 0..255 or a float type in 0..1.
        name: what the error message calls it.

    Raises:
        BadVideoError: not four axes, no frames or pixels, not three channels, another dtype, NaN or inf, values out of range.
    """
    array = np.asarray(video)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise BadVideoError(
            f"{name} has shape {tuple(array.shape)}; a video is [frames, height, width, 3]"
            + (" (take one of the batch: video[0])" if array.ndim == 5 else "")
        )
    if 0 in array.shape:
        raise BadVideoError(f"{name} is empty: shape {tuple(array.shape)}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise BadVideoError(f"{name} is {array.dtype}; give uint8 in 0..255 or a float type in 0..1")
    low, high = float(array.min()), float(array.max())  # NaN where there is one
    if -RANGE_SLACK <= low and high <= 1 + RANGE_SLACK:
        return array
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise BadVideoError(f"{name} holds {bad} values of {array.size} that are NaN or inf")
    wide = array.astype(np.float64)
    outside = int(((wide < -RANGE_SLACK) | (wide > 1 + RANGE_SLACK)).sum())
    hint = "divide by 255" if low >= 0 and high <= UINT8_MAX else "map [-1, 1] by x / 2 + 0.5"
    raise BadVideoError(f"{name} is float in [{low:.4g}, {high:.4g}], {outside} values of {array.size} out of range; "
                        f"floats must lie in 0..1 ({hint}?)")


def as_unit(frames: np.ndarray) -> np.ndarray:
    """Checked frames as float64 in [0, 1]; uint8 is divided by 255."""
    if frames.dtype == np.uint8:
        return frames / UINT8_MAX
    wide = frames.astype(np.float64)
    return np.clip(wide, 0.0, 1.0, out=wide)


def as_video(video, name: str = "video") -> np.ndarray:
    """Check one video, as `checked` does, and give it as float64 [F, H, W, 3] in [0, 1]."""
    return as_unit(checked(video, name))


def checked_pair(video, reference) -> tuple[np.ndarray, np.ndarray]:
    """Check a video and the reference it is compared with, [F, H, W, 3] of one shape, and give both as they came.

    Raises:
        BadVideoError: as `checked`, or the shapes differ.
    """
    return same_shape(checked(video, "video"), checked(reference, "reference"))


def same_shape(video, reference) -> tuple:
    """Both arrays or tensors. Raises BadVideoError if their shapes differ."""
    first, second = tuple(video.shape), tuple(reference.shape)
    if first != second:
        raise BadVideoError(f"video is {first} but reference is {second}; a pair has one shape [F, H, W, 3]")
    return video, reference


def as_pair(video, reference) -> tuple[np.ndarray, np.ndarray]:
    """`checked_pair`, both as float64 in [0, 1]."""
    video, reference = checked_pair(video, reference)
    return as_unit(video), as_unit(reference)


def as_uint8(video, name: str = "video") -> np.ndarray:
    """The video as uint8 [F, H, W, 3], rounded to nearest; what an encoder or a scorer takes."""
    array = checked(video, name)
    if array.dtype == np.uint8:
        return array
    rounded = np.empty(array.shape, np.uint8)
    for frame, wide in zip(rounded, array):
        wide = as_unit(wide)
        wide *= UINT8_MAX
        frame[...] = np.rint(wide, out=wide)
    return rounded


def luma(video: np.ndarray) -> np.ndarray:
    """BT.601 luma [F, H, W] of a checked float video [F, H, W, 3]."""
    return video @ np.array([0.299, 0.587, 0.114])


def read_video(path) -> np.ndarray:
    """Read a video file as uint8 [F, H, W, 3].

    Raises:
        BadVideoError: no such file, or no decoder can read it (says so with the decoder's words).
    """
    path = Path(path)
    if not path.is_file():
        raise BadVideoError(f"{path}: no such video file")
    try:
        frames, _ = video_files.read_video(path)
    except Exception as error:  # imageio raises whatever its plugin raises
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise BadVideoError(f"{path}: not a readable video ({reason})") from error
    return as_uint8(frames, str(path))
