"""Clips on disk: lossless RGB H.264 as the record of a run, and small reels of all runs of a prompt for the report."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from lowbit_video.files import write_whole

from ..video import as_uint8


def encode(path: Path, frames: np.ndarray, fps: float, arguments: list[str], codec: str) -> None:
    """Write frames [F, H, W, 3] uint8 to `path`, whole or not at all."""
    import imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as part:
        with imageio.get_writer(part, format="FFMPEG", mode="I", fps=fps, codec=codec, macro_block_size=1, quality=None,
                                pixelformat=arguments[1], output_params=arguments[2:], ffmpeg_log_level="error") as writer:
            for frame in frames:
                writer.append_data(frame)


def write_lossless(path, video, fps: float) -> None:
    """Keep a video as it is, to the bit: lossless RGB H.264 (most players show it; some browsers do not)."""
    encode(Path(path), as_uint8(video), fps, ["-pix_fmt", "rgb24", "-qp", "0", "-preset", "veryfast"], "libx264rgb")


def grid(count: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) that put `count` tiles of this size into a picture as square as can be."""
    best = min(range(1, count + 1), key=lambda columns: max(columns * width, -(-count // columns) * height))
    return -(-count // best), best


def write_reel(path, videos: list[np.ndarray], fps: float, quality: int = 12) -> tuple[int, int]:
    """Tile videos [F, H, W, 3] of one size into one H.264 film that every browser plays, all in step by construction.

    Args:
        quality: x264's constant rate factor; 12 leaves errors of one or two levels.

    Returns:
        (rows, columns) of the tiling, in reading order.
    """
    videos = [as_uint8(video) for video in videos]
    frames, height, width = videos[0].shape[:3]
    rows, columns = grid(len(videos), height, width)
    sheet = np.zeros((frames, rows * height, columns * width, 3), np.uint8)
    for i, video in enumerate(videos):
        row, column = divmod(i, columns)
        sheet[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = video
    pad = [(0, 0), (0, sheet.shape[1] % 2), (0, sheet.shape[2] % 2), (0, 0)]  # 4:2:0 chroma wants even sides
    arguments = ["-pix_fmt", "yuv420p", "-crf", str(quality), "-preset", "slow", "-movflags", "+faststart",
                 "-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries", "bt709",
                 "-color_trc", "bt709"]
    encode(Path(path), np.pad(sheet, pad), fps, arguments, "libx264")
    return rows, columns
