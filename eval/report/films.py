"""The report's films: all runs of a prompt as tiles of one H.264 film, which keeps them in step, from their lossless clips."""
from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..compare.candidates import FLOOR
from ..compare.clips import FILM_CRF, tile_of, write_reel
from ..metrics import rmse
from ..video import BadVideoError, read_video
from .data import Report

TILE_SIDE = 560  # pixels; wider videos are shown at half, a third, ... of their size
THUMBNAIL_SIDE = 144  # pixels


@dataclass(frozen=True)
class Reel:
    """One prompt's film: H.264 bytes, its runs in reading order, columns of tiles, a tile's size, frames, a small picture.

    levels: by how much the film differs from its tiles, root mean square, of 255 levels.
    """

    film: bytes
    runs: list[str]
    columns: int
    width: int
    height: int
    frames: int
    thumbnail: str
    levels: float


def make_reels(report: Report, say: Callable[[str], None] = print, tile_side: int = TILE_SIDE,
               crf: int = FILM_CRF) -> dict[tuple, Reel]:
    """The films of all finished prompts, tiles at most `tile_side` pixels wide; a clip that is gone is left out, and said."""
    reels = {}
    for pair in report.pairs():
        clips = {}
        for row in report.summary.rows:
            line = report.videos.get((*pair, row.run), {})
            if row.run == FLOOR or "clip" not in line:
                continue
            try:
                clips[row.run] = read_video(report.folder / line["clip"])
            except BadVideoError as error:
                say(f"left out of the films: {error}")
        if len({clip.shape for clip in clips.values()}) == 1:
            reels[pair] = make_reel(clips, report.run["settings"]["fps"], tile_side, crf)
    return reels


def make_reel(clips: dict[str, np.ndarray], fps: float, tile_side: int = TILE_SIDE, crf: int = FILM_CRF) -> Reel:
    """One film of clips [F, H, W, 3] of one shape."""
    factor = -(-next(iter(clips.values())).shape[2] // tile_side)
    videos = [smaller(clip, factor) for clip in clips.values()]
    frames, height, width = videos[0].shape[:3]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "reel.mp4"
        _, columns = write_reel(path, videos, fps, crf)
        return Reel(path.read_bytes(), list(clips), columns, width, height, frames, thumbnail(videos[0][frames // 2]),
                    film_error(read_video(path), videos, columns))


def film_error(film: np.ndarray, tiles: list[np.ndarray], columns: int) -> float:
    """Root mean square difference of a film from its tiles [F, H, W, 3], which lie in it in reading order."""
    height, width = tiles[0].shape[1:3]
    by_frame = [rmse.measure(shown, made) for i, tile in enumerate(tiles)
                for shown, made in zip(tile_of(film, i, columns, height, width), tile, strict=True)]
    return float(np.sqrt(np.mean(np.square(by_frame))))


def smaller(clip: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [F, H, W, 3] averaged over factor x factor pixels."""
    if factor == 1:
        return clip
    frames, height, width = clip.shape[0], clip.shape[1] // factor, clip.shape[2] // factor
    blocks = clip[:, : height * factor, : width * factor].reshape(frames, height, factor, width, factor, 3)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


def thumbnail(frame: np.ndarray) -> str:
    """A JPEG data URL of a frame."""
    import imageio.v3 as iio

    buffer = io.BytesIO()
    small = smaller(frame[None], max(1, frame.shape[1] // THUMBNAIL_SIDE))[0]
    iio.imwrite(buffer, small, extension=".jpg", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
