"""Clips and reels: the first to the bit, the second with their colours converted and tagged."""
import itertools
import subprocess

import numpy as np

from lowbit_video.eval.compare.clips import write_lossless, write_reel
from lowbit_video.pipelines.shared import video_files

COLOURS = np.array(list(itertools.product([0, 128, 255], repeat=3)), np.uint8)


def test_a_clip_is_kept_to_the_bit(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), np.uint8)
    write_lossless(tmp_path / "new" / "a.mp4", video, 8)
    np.testing.assert_array_equal(video_files.read_video(tmp_path / "new" / "a.mp4")[0], video)


def test_the_colours_of_a_reel_come_back(tmp_path):
    video = np.tile(COLOURS[:, None, None], (1, 32, 48, 1))
    write_reel(tmp_path / "a.mp4", [video, video[::-1]], 8)
    got, _ = video_files.read_video(tmp_path / "a.mp4")
    inner = got[:, 4:28, 4:44].astype(int)  # colours of two tiles meet at the edge
    assert abs(inner - video[:, 4:28, 4:44]).max() <= 3
    said = subprocess.run([video_files.ffmpeg(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert "(tv, bt709, progressive)" in said
