"""Clips on disk: lossless RGB H.264 as the record of a run, and small reels of all runs of a prompt for the report."""
from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from lowbit_video.pipelines.shared import video_files

from ..video import as_uint8

FILM_CRF = 12  # x264's constant rate factor: 12 leaves one or two levels of 255, more at coloured edges


def write_lossless(path, video, fps: float) -> None:
    """Keep a video as it is, to the bit: lossless RGB H.264 (most players show it; some browsers do not)."""
    _write(path, as_uint8(video), fps, ["-c:v", "libx264rgb", "-pix_fmt", "rgb24", "-qp", "0", "-preset", "veryfast"])


def check_clips(folder, fps: float) -> None:
    """Makes sure, by a tiny one, that clips can be written into a folder, before the work. Raises as `video_files.encode`."""
    folder = Path(video_files.check_writable(Path(folder) / "clip.mp4")).parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=".try") as scratch:
        write_lossless(Path(scratch) / "try.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps)


def _write(path, frames: np.ndarray, fps: float, arguments: list[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    video_files.encode(path, frames, fps, arguments)


def grid(count: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) that put `count` tiles of this size into a picture as square as can be."""
    best = min(range(1, count + 1), key=lambda columns: max(columns * width, -(-count // columns) * height))
    return -(-count // best), best


def tile_of(sheet: np.ndarray, i: int, columns: int, height: int, width: int) -> np.ndarray:
    """The i-th tile of a film [F, H, W, 3], in reading order; a view."""
    row, column = divmod(i, columns)
    return sheet[:, row * height : (row + 1) * height, column * width : (column + 1) * width]


def write_reel(path, videos: list[np.ndarray], fps: float, quality: int = FILM_CRF) -> tuple[int, int]:
    """Tile videos [F, H, W, 3] of one size into one H.264 film that every browser plays, all in step by construction.

    Args:
        quality: x264's constant rate factor.

    Returns:
        (rows, columns) of the tiling, in reading order.
    """
    videos = [as_uint8(video) for video in videos]
    frames, height, width = videos[0].shape[:3]
    rows, columns = grid(len(videos), height, width)
    sheet = np.zeros((frames, rows * height, columns * width, 3), np.uint8)
    for i, video in enumerate(videos):
        tile_of(sheet, i, columns, height, width)[...] = video
    pad = [(0, 0), (0, sheet.shape[1] % 2), (0, sheet.shape[2] % 2), (0, 0)]  # 4:2:0 chroma wants even sides
    _write(path, np.pad(sheet, pad), fps, [*video_files.h264(quality), "-preset", "slow", "-movflags", "+faststart"])
    return rows, columns
