"""Videos written and read back, and nothing half-written left behind."""
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from lowbit_video.pipelines import check_writable, export_to_video, read_video, side_by_side
from lowbit_video.pipelines.shared import video_files as module


def video(frames=9, height=48, width=64):
    """Smooth colours that move, [F, H, W, 3] in [0, 1]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([0.5 + 0.4 * np.sin((t + x) / 9), y / height, x / width], axis=-1).astype(np.float32)


@pytest.mark.parametrize("frames, height, width, fps", [(9, 48, 64, 8), (1, 96, 160, 16), (17, 30, 46, 24), (49, 64, 96, 12.5)])
def test_round_trip(tmp_path, frames, height, width, fps):
    source = video(frames, height, width)
    path = export_to_video(source, tmp_path / "new" / "a.mp4", fps)
    assert path == str(tmp_path / "new" / "a.mp4")
    assert os.listdir(tmp_path / "new") == ["a.mp4"]
    got, got_fps = read_video(path)
    assert got.shape == (frames, height, width, 3) and got.dtype == np.uint8
    assert got_fps == pytest.approx(fps, abs=0.01)
    assert abs(got / 255.0 - source).mean() < 0.02


@pytest.mark.parametrize("height, width", [(33, 47), (32, 47), (33, 48)])
def test_odd_sides(tmp_path, height, width):
    got, _ = read_video(export_to_video(video(3, height, width), tmp_path / "a.mp4"))
    assert got.shape == (3, height, width, 3)


def test_uint8_and_lists_are_taken(tmp_path):
    frames = [(frame * 255).astype(np.uint8) for frame in video(4)]
    got, _ = read_video(export_to_video(frames, tmp_path / "a.mp4"))
    assert abs(got.astype(int) - np.stack(frames)).mean() < 5


COLOURS = np.array([*itertools.product([0, 255], repeat=3), [128, 128, 128], [200, 30, 60], [17, 90, 211]], np.uint8)


def flat(height, width):
    """A frame of each colour, [F, H, W, 3] uint8."""
    return np.tile(COLOURS[:, None, None], (1, height, width, 1))


def stream_of(path):
    """What ffmpeg says of a file's video."""
    said = subprocess.run([module.ffmpeg(), "-i", path], capture_output=True, text=True).stderr
    return next(line for line in said.splitlines() if "Video:" in line)


@pytest.mark.parametrize("height, width", [(2, 2), (16, 16), (15, 17), (64, 96), (480, 720), (720, 1280)])
def test_colours_come_back_within_two_levels_and_are_tagged(tmp_path, height, width):
    path = export_to_video(flat(height, width), tmp_path / "a.mp4")
    got, _ = read_video(path)
    assert abs(got.astype(int) - flat(height, width)).max() <= 2
    assert "(tv, bt709, progressive)" in stream_of(path)
    luma = subprocess.run([module.ffmpeg(), "-v", "error", "-i", path, "-vf", "extractplanes=y", "-f", "rawvideo", "-"],
                          capture_output=True, check=True).stdout
    luma = np.frombuffer(luma, np.uint8).reshape(-1, height, width).mean((1, 2))
    assert abs(luma - (16 + COLOURS / 255 * 219 @ [0.2126, 0.7152, 0.0722])).max() <= 1.5


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_half_written(tmp_path, monkeypatch, error):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"what was there")

    class Frames:
        shape = (3, 16, 16, 3)

        def __iter__(self):
            yield np.zeros((16, 16, 3), np.uint8)
            raise error

    monkeypatch.setattr(module, "as_uint8", lambda frames: frames)
    with pytest.raises(error):
        export_to_video(Frames(), path)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"what was there"


def test_check_writable(tmp_path):
    assert check_writable(tmp_path / "new" / "a.mp4") == str(tmp_path / "new" / "a.mp4")
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into .*choose another"):
        check_writable(tmp_path / "file" / "a.mp4")
    with pytest.raises(OSError, match="cannot write into /proc/nowhere"):
        check_writable("/proc/nowhere/a.mp4")


@pytest.mark.parametrize(
    "frames, message",
    [
        (np.zeros((1, 2, 8, 8, 3)), r"take frames\[0\]"),
        (np.zeros((2, 8, 8)), r"expected \[frames, height, width, 3\]"),
        (np.zeros((0, 8, 8, 3)), "expected"),
        (np.zeros((2, 8, 8, 3), np.int64), "int64"),
        (np.full((1, 8, 8, 3), np.nan), "192 values of 192 that are NaN"),
        (np.full((1, 8, 8, 3), np.inf), "192 values of 192 that are NaN or infinite"),
        (video(3) * 255, r"of 27648 outside \[0, 1\], from .*divide by 255"),
        (video(3) * 2 - 1, r"of 27648 outside \[0, 1\], from .*x / 2 \+ 0.5"),
        (np.stack([video(1)[0], video(1)[0] - 0.5]), "outside"),
    ],
)
def test_bad_frames(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        export_to_video(frames, tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


def stand_in(tmp_path, monkeypatch, script):
    """Another ffmpeg, which is this shell script."""
    path = tmp_path / "bin" / "ffmpeg"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))


WITHOUT_X264 = "echo \"Unknown encoder 'libx264'\" >&2; exit 8"


@pytest.mark.parametrize("script, said", [
    (WITHOUT_X264, "ffmpeg ended with status 8: Unknown encoder 'libx264'"),
    ("cat > /dev/null", "ffmpeg ended with status 0: it said nothing"),
    (f'ulimit -f 1; exec "{module.ffmpeg()}" "$@"', "ffmpeg ended with status"),  # no room for the file
], ids=["no libx264", "no file", "full"])
def test_an_encoder_that_fails_leaves_what_was_there_and_keeps_the_frames(tmp_path, monkeypatch, script, said):
    stand_in(tmp_path, monkeypatch, script)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.mp4").write_bytes(b"what was there")
    frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8)
    with pytest.raises(OSError, match="cannot write") as error:
        export_to_video(frames, out / "a.mp4")
    assert said in str(error.value) and f"kept in {out / 'a.frames.npy'}" in str(error.value)
    assert sorted(os.listdir(out)) == ["a.frames.npy", "a.mp4"] and (out / "a.mp4").read_bytes() == b"what was there"
    np.testing.assert_array_equal(np.load(out / "a.frames.npy"), frames)


def test_frames_go_elsewhere_where_the_folder_takes_none(tmp_path, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write into .*kept in {tmp_path / 'a.frames.npy'}"):
        export_to_video(video(3), tmp_path / "file" / "a.mp4")
    assert len(np.load(tmp_path / "a.frames.npy")) == 3


def test_what_can_be_known_of_the_encoder_is_tried_before(tmp_path, monkeypatch):
    assert check_writable(tmp_path / "a.mp4", 8) and os.listdir(tmp_path) == []
    for fps in (1e-9, 0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="fps is .*from 0.01 to 1000"):
            check_writable(tmp_path / "a.mp4", fps)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(OSError, match="/nowhere/ffmpeg does not start"):
        check_writable(tmp_path / "a.mp4", 8)
    stand_in(tmp_path, monkeypatch, WITHOUT_X264)
    with pytest.raises(OSError, match="Unknown encoder"):
        check_writable(tmp_path / "a.mp4", 8)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="videos are written by ffmpeg, and there is none: pip install"):
        check_writable(tmp_path / "a.mp4", 8)
    assert os.listdir(tmp_path) == ["bin"]


@pytest.mark.parametrize("fps", [0.01, 23.976, 1000])
def test_the_ends_of_the_range_of_fps_are_written(tmp_path, fps):
    assert len(read_video(export_to_video(video(3), tmp_path / "a.mp4", fps))[0]) == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_hair_past_the_range_is_rounding(dtype):
    frames = np.stack([np.full((8, 8, 3), value, dtype) for value in (-1e-4, 1 + 1e-4, 0.5)])
    assert [frame.max() for frame in module.as_uint8(frames)] == [0, 255, 128]


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="only .mp4"):
        export_to_video(video(2), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="fps is 0"):
        export_to_video(video(2), tmp_path / "a.mp4", 0)
    with pytest.raises(FileNotFoundError, match="no such video"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot be read"):
        read_video(tmp_path / "bad.mp4")


def test_side_by_side(tmp_path):
    a, b = video(5), 1 - video(7)
    joined = side_by_side([a, b], ["exact", "int8+fp8"])
    assert joined.shape == (5, 48 + module.LABEL_HEIGHT, 64 * 2 + module.GAP_WIDTH, 3)
    np.testing.assert_array_equal(joined[:, -48:, :64], module.as_uint8(a))
    np.testing.assert_array_equal(joined[:, -48:, -64:], module.as_uint8(b)[:5])
    strip = joined[0, : module.LABEL_HEIGHT]
    assert (strip[:, :64] != module.GREY).any() and (strip[:, -64:] != module.GREY).any()
    plain = side_by_side([a, b])
    assert plain.shape == (5, 48, 132, 3)
    assert read_video(export_to_video(joined, tmp_path / "a.mp4"))[0].shape == joined.shape
    with pytest.raises(ValueError, match="one size"):
        side_by_side([a, video(5, 32, 32)])
    with pytest.raises(ValueError, match="1 labels for 2"):
        side_by_side([a, b], ["one"])
