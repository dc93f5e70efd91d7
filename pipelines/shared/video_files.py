"""Videos as mp4 files: tried before the work, written whole or not at all, read back, joined side by side.

Colour is BT.709 in limited range, converted and tagged, whatever the size: untagged, a player guesses BT.601 for a small video
and BT.709 for a large one.
"""
from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lowbit_video.files import write_whole

CRF = 10  # x264's constant rate factor: 0 lossless, 51 worst
ROUNDED = "accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"  # how swscale changes colours without being off by three
BT709 = (f"scale=out_color_matrix=bt709:out_range=tv:flags=area+{ROUNDED},format={{pixels}},"
         "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv")
MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_FFMPEG_WORDS = 300  # of its error messages, from the end
LABEL_HEIGHT = 20  # pixels of the strip above each video of `side_by_side`
GAP_WIDTH = 4  # pixels between two videos
GREY = 24
RANGE_SLACK = 1e-3  # how far past [0, 1] rounding (float16's too) may carry a pixel before it is called a wrong range


class BadFramesError(ValueError):
    """Pixels that are no video: their shape, type or range, or values that are not finite."""


class EncodeError(OSError):
    """A video that ffmpeg did not write."""


def check_writable(path: str | os.PathLike, fps: float | None = None) -> str:
    """Makes sure that a file can be written at `path`, before the work whose result it will hold.

    Args:
        path: of the file to come; its folder is made if need be.
        fps: of a video to come; a tiny one is then encoded in the folder, and removed.
    Returns:
        the path, absolute.
    Raises:
        OSError: the folder cannot be made or written, the path is a folder, or the tiny video cannot be written.
        ImportError: there is no ffmpeg.
        ValueError: fps out of range.
    """
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give the name of a file in it")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"cannot write into {folder}: {error.strerror or error}; choose another output folder") from error
    if fps is not None:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".try") as scratch:
            encode(os.path.join(scratch, "try.mp4"), np.zeros((2, 16, 16, 3), np.uint8), fps, h264())
    return path


def h264(crf: int = CRF, pixels: str = "yuv420p") -> list[str]:
    """ffmpeg's arguments for H.264 in BT.709, limited range."""
    return ["-c:v", "libx264", "-crf", str(crf), "-vf", BT709.format(pixels=pixels), "-colorspace", "bt709",
            "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]


def encode(path: str | os.PathLike, frames: np.ndarray, fps: float, arguments: Sequence[str]) -> None:
    """Writes frames [F, H, W, 3] uint8 to `path` by ffmpeg with these arguments, whole or not at all.

    Raises:
        EncodeError: ffmpeg failed or could not be started; its own words are given.
        ImportError: there is no ffmpeg.
        ValueError: fps out of range.
    """
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps is {fps}; it must be from {MIN_FPS} to {MAX_FPS:g}")
    height, width = frames.shape[1:3]
    with write_whole(path) as temporary, tempfile.TemporaryFile() as words:
        command = [ffmpeg(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
                   "-r", f"{fps:.12g}", "-i", "-", "-an", *arguments, str(temporary)]
        try:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words)
        except OSError as error:
            raise EncodeError(f"cannot write {path}: {command[0]} does not start ({error})") from error
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended early; its status and words say why
                for frame in frames:
                    child.stdin.write(np.ascontiguousarray(frame).data)
                child.stdin.close()
            status = child.wait()
        except BaseException:
            child.kill()  # else it would go on, and its file would come back
            child.wait()
            raise
        if status or not os.path.isfile(temporary):
            words.seek(0)
            said = words.read().decode(errors="replace").strip()[-MAX_FFMPEG_WORDS:]
            raise EncodeError(f"cannot write {path}: ffmpeg ended with status {status}: {said or 'it said nothing'}")


def ffmpeg() -> str:
    """The ffmpeg that writes videos: imageio-ffmpeg's own, or what IMAGEIO_FFMPEG_EXE names.

    Raises:
        ImportError: there is none.
    """
    hint = "pip install 'imageio[ffmpeg]', or name an ffmpeg with libx264 in the environment variable IMAGEIO_FFMPEG_EXE"
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"videos are written by ffmpeg, and there is none: {hint}") from error


def export_to_video(frames: Any, path: str | os.PathLike, fps: float = 8) -> str:
    """Writes one video as H.264 mp4.

    Args:
        frames: [F, H, W, 3], uint8, or floating point in [0, 1]; an array or a sequence of frames.
        path: ends in ".mp4"; its folder is made if need be; an existing file is replaced when the new one is complete.
        fps: frames a second.
    Returns:
        the path, absolute.
    Raises:
        ValueError: frames that are no video, or fps out of range.
        EncodeError: the folder cannot be written or ffmpeg failed; the frames are then kept in a .npy file that it names.
    """
    frames = as_uint8(frames)
    path = os.path.abspath(os.fspath(path))
    if os.path.splitext(path)[1].lower() != ".mp4":
        raise ValueError(f"cannot write {path}: only .mp4 is supported")
    height, width = frames.shape[1:3]
    # Colour at half resolution, which every player takes, needs even sides.
    pixels = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
    try:
        encode(check_writable(path), frames, fps, h264(pixels=pixels))
    except (OSError, ImportError) as error:
        raise EncodeError(f"{error}; {_keep_frames(path, frames)}") from error
    return path


def _keep_frames(path: str, frames: np.ndarray) -> str:
    """Saves what could not be encoded, beside `path` or else in the temporary folder; says where."""
    for folder in (os.path.dirname(path), tempfile.gettempdir()):
        kept = os.path.join(folder, f"{os.path.splitext(os.path.basename(path))[0]}.frames.npy")
        try:
            with write_whole(kept) as temporary:
                np.save(temporary, np.asarray(frames))
        except OSError:
            continue
        return f"its frames are kept in {kept}: export_to_video(numpy.load({kept!r}), ...) makes the video"
    return "nor could its frames be kept, here or in the temporary folder"


def read_video(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Reads a video file: frames [F, H, W, 3] uint8, and frames a second.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video.
    """
    import imageio.v2 as imageio

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such video: {path}")
    try:
        with imageio.get_reader(path, format="FFMPEG", output_params=["-sws_flags", f"neighbor+{ROUNDED}"]) as reader:
            fps = float(reader.get_meta_data()["fps"])
            frames = [np.asarray(frame) for frame in reader]
    except (OSError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    return np.stack(frames), fps


def side_by_side(videos: Iterable[Any], labels: Sequence[str] | None = None) -> np.ndarray:
    """Joins videos of the same size from left to right, each under its label.

    Args:
        videos: each [F, H, W, 3], as in `export_to_video`; the shortest one sets the length.
        labels: one for each video.
    Returns:
        [F, H', W', 3] uint8, sides even.
    Raises:
        ValueError: sizes that differ, or as many labels as there are videos not given.
    """
    videos = [as_uint8(video) for video in videos]
    if not videos or len({video.shape[1:] for video in videos}) != 1:
        raise ValueError(f"side_by_side needs videos of one size, got {[list(video.shape) for video in videos]}")
    if labels is not None and len(labels) != len(videos):
        raise ValueError(f"{len(labels)} labels for {len(videos)} videos; give one each")
    frames = min(len(video) for video in videos)
    _, height, width, _ = videos[0].shape
    parts = []
    for i, video in enumerate(videos):
        part = np.full((frames, height + (LABEL_HEIGHT if labels else 0), width, 3), GREY, np.uint8)
        if labels:
            part[:, :LABEL_HEIGHT] = _label(labels[i], width)
        part[:, -height:] = video[:frames]
        if i:
            parts.append(np.full((frames, part.shape[1], GAP_WIDTH, 3), GREY, np.uint8))
        parts.append(part)
    joined = np.concatenate(parts, axis=2)
    return np.pad(joined, [(0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)], constant_values=GREY)


def as_uint8(frames: Any) -> np.ndarray:
    """Frames as [F, H, W, 3] uint8; floating point counts as [0, 1].

    Raises:
        BadFramesError: another shape or type, no frames, or values that are not finite or lie outside [0, 1].
    """
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        hint = "; a call's `frames` holds one such array per video: take frames[0]" if array.ndim == 5 else ""
        raise BadFramesError(f"frames have shape {list(array.shape)}; expected [frames, height, width, 3]{hint}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise BadFramesError(f"frames have type {array.dtype}; expected uint8, or floating point in [0, 1]")
    if not np.isfinite(array).all():
        raise BadFramesError(f"frames have {int((~np.isfinite(array)).sum())} values of {array.size} that are NaN or infinite")
    outside = int(((array < -RANGE_SLACK) | (array > 1 + RANGE_SLACK)).sum())
    if outside:
        low, high = float(array.min()), float(array.max())
        hint = "divide by 255" if low >= 0 and high <= 255 else "map [-1, 1] by x / 2 + 0.5"
        raise BadFramesError(f"frames have {outside} values of {array.size} outside [0, 1], from {low:.4g} to {high:.4g}; "
                             f"floating point must lie in [0, 1] ({hint}?)")
    return (np.clip(array, 0.0, 1.0) * 255).round().astype(np.uint8)


def _label(text: str, width: int) -> np.ndarray:
    """A strip [LABEL_HEIGHT, width, 3] uint8 with a text."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, LABEL_HEIGHT), (GREY, GREY, GREY))
    ImageDraw.Draw(strip).text((4, 4), text, fill=(235, 235, 235))
    return np.asarray(strip)
