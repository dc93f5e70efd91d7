"""Clips and reels: the first to the bit, the second with their colours converted and tagged."""
import itertools
import subprocess

import numpy as np
import pytest

from lowbit_video.eval.compare.clips import check_clips, grid, write_lossless, write_reel
from lowbit_video.eval.compare.paired import compare
from lowbit_video.pipelines.shared import video_files

COLOURS = np.array(list(itertools.product([0, 128, 255], repeat=3)), np.uint8)


def test_a_clip_is_kept_to_the_bit(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), np.uint8)
    write_lossless(tmp_path / "new" / "a.mp4", video, 8)
    np.testing.assert_array_equal(video_files.read_video(tmp_path / "new" / "a.mp4")[0], video)


def test_an_encoder_without_the_codec_is_found_before_the_work(tmp_path, monkeypatch):
    check_clips(tmp_path / "new", 8)
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(OSError, match="does not start"):
        compare(None, ["a cat"], ["int8+fp16"], tmp_path, metrics=["psnr"])


def test_the_colours_of_a_reel_come_back(tmp_path):
    video = np.tile(COLOURS[:, None, None], (1, 32, 48, 1))
    write_reel(tmp_path / "a.mp4", [video, video[::-1]], 8)
    got, _ = video_files.read_video(tmp_path / "a.mp4")
    inner = got[:, 4:28, 4:44].astype(int)  # colours of two tiles meet at the edge
    assert abs(inner - video[:, 4:28, 4:44]).max() <= 3
    said = subprocess.run([video_files.ffmpeg(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert "(tv, bt709, progressive)" in said


@pytest.mark.parametrize("count, height, width, wanted", [
    (1, 10, 10, (1, 1)), (2, 32, 48, (2, 1)), (2, 48, 32, (1, 2)), (4, 10, 10, (2, 2)), (5, 10, 10, (3, 2)),
    (7, 10, 10, (3, 3)), (6, 10, 30, (6, 1)), (6, 30, 10, (2, 3))])
def test_tiles_make_a_picture_as_square_as_can_be(count, height, width, wanted):
    assert grid(count, height, width) == wanted


@pytest.mark.parametrize("height, width", [(33, 47), (33, 48), (32, 47)])
def test_tiles_lie_in_reading_order_and_sides_are_even(tmp_path, height, width):
    greys = [20, 120, 220]
    rows, columns = write_reel(tmp_path / "a.mp4", [np.full((2, height, width, 3), grey, np.uint8) for grey in greys], 8)
    got, _ = video_files.read_video(tmp_path / "a.mp4")
    assert (rows, columns) == (2, 2) and got.shape == (2, 2 * height, 2 * width, 3)
    middles = [got[0, row * height + height // 2, column * width + width // 2, 0] for row in (0, 1) for column in (0, 1)]
    np.testing.assert_allclose(middles, [*greys, 0], atol=4)
    write_reel(tmp_path / "b.mp4", [np.full((2, height, width, 3), 120, np.uint8)], 8)
    assert video_files.read_video(tmp_path / "b.mp4")[0].shape == (2, height + height % 2, width + width % 2, 3)
