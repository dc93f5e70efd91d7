"""Clips and reels: the first to the bit, the second with their colours converted and tagged."""
import itertools
import subprocess

import numpy as np
import pytest

from lowbit_video.eval.compare.clips import check_clips, write_lossless, write_reel
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
