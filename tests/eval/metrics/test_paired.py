"""The paired metrics: against scikit-image, and every bad input by name."""
import numpy as np
import pytest

from lowbit_video.eval.compare.paired import figures
from lowbit_video.eval.metrics import registry
from lowbit_video.eval.metrics.ms_ssim import ms_ssim
from lowbit_video.eval.metrics.psnr import CEILING_DB, psnr
from lowbit_video.eval.metrics.shared.context import Context
from lowbit_video.eval.metrics.ssim import ssim
from lowbit_video.eval.video import BadVideoError, read_video

PAIRED = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}


def clip(shape=(3, 40, 51, 3), seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    t, y, x, _ = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    video = 0.5 + 0.4 * np.sin(0.3 * x + 0.2 * y + 0.5 * t + np.arange(3))
    return (video + noise * rng.standard_normal(shape)).clip(0, 1)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_psnr_and_ssim_agree_with_scikit_image(noise):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    reference, video = clip(), clip(noise=noise)
    expected = [metrics.peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in zip(video, reference)]
    assert np.allclose(psnr(video, reference), expected, atol=1e-4)
    expected = [
        metrics.structural_similarity(
            a, b, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(video, reference)
    ]
    assert np.allclose(ssim(video, reference), expected, atol=1e-4)


@pytest.mark.parametrize("name", PAIRED)
def test_uint8_and_float_give_one_figure(name):
    video, reference = (np.rint(255 * clip(noise=n)).astype(np.uint8) for n in (0.05, 0.0))
    assert np.allclose(PAIRED[name](video, reference), PAIRED[name](video / 255.0, (reference / 255.0).astype(np.float64)))


def test_identical_videos_reach_the_top():
    assert (psnr(clip(), clip()) == CEILING_DB).all()
    assert np.allclose(ssim(clip(), clip()), 1.0)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize(
    "video, words",
    [
        (clip((2, 40, 51, 3)), "but reference is"),
        (clip()[0], "a video is"),
        (clip()[None], "take one of the batch"),
        (clip()[:0], "empty"),
        (clip() * 255.0, "divide by 255"),
        (clip() * 2 - 1, r"\[-1, 1\]"),
        (clip().astype(np.int32), "int32"),
        (np.where(np.arange(3) == 1, np.nan, clip()), "NaN"),
    ],
    ids=["unequal", "one-frame", "batch", "empty", "0..255-float", "minus-one", "int32", "nan"],
)
def test_bad_input_is_named(name, video, words):
    with pytest.raises(BadVideoError, match=words):
        PAIRED[name](video, clip())


@pytest.mark.parametrize("name", [m.name for m in registry.choose(None, {})[0] if m.kind in ("paired", "alone")])
@pytest.mark.parametrize("video, words", [(clip() * 255.0, "divide by 255"), (clip()[0], "a video is"), (clip()[:0], "empty")],
                         ids=["0..255-float", "one-frame", "empty"])
def test_every_metric_that_runs_here_names_bad_input_as_an_evaluation_calls_it(name, video, words):
    context = Context("a red circle moves left over a blue background", {}, {}, {})
    with pytest.raises(BadVideoError, match=words):
        figures(video, clip(), [registry.metric(name)], context)


def test_a_frame_smaller_than_the_window_is_named():
    with pytest.raises(BadVideoError, match="11x11"):
        ssim(clip((1, 8, 40, 3)), clip((1, 8, 40, 3)))


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(BadVideoError, match="no such video"):
        read_video(tmp_path / "none.mp4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video at all" * 100)
    with pytest.raises(BadVideoError, match="broken.mp4: not a readable video"):
        read_video(broken)
