"""The temporal measures on clips whose answer is known: still, moving, flickering, jerky."""
import numpy as np
import pytest

pytest.importorskip("skimage", reason="scikit-image is not installed")

from lowbit_video.eval.metrics.dynamic_degree import dynamic_degree
from lowbit_video.eval.metrics.flicker import flicker
from lowbit_video.eval.metrics.motion_smoothness import motion_smoothness
from lowbit_video.eval.metrics.warping_error import warping_error
from lowbit_video.eval.video import BadVideoError


def moving_disc(frames=5, speed=2.0, flash=0.0, jerk=0.0, size=(64, 80)):
    """A soft disc moving right by `speed` pixels a frame; every other frame is brighter by `flash`, off course by `jerk`."""
    y, x = np.mgrid[: size[0], : size[1]]
    out = []
    for t in range(frames):
        odd = t % 2
        distance = np.hypot(x - 24 - speed * t - jerk * odd, y - 32)
        out.append(0.25 + 0.1 * np.sin(x / 7) * np.cos(y / 9) + 0.4 / (1 + np.exp(distance - 12)) + flash * odd)
    return np.repeat(np.array(out)[..., None], 3, axis=-1).clip(0, 1)


def test_a_still_clip_has_no_flicker_no_error_no_motion():
    still = moving_disc(speed=0)
    assert flicker(still) == 0
    assert warping_error(still) < 1e-6
    assert motion_smoothness(still) > 1 - 1e-6
    assert dynamic_degree(still) < 0.05


def test_flicker_counts_levels():
    clip = np.zeros((4, 8, 8, 3), np.uint8)
    clip[1::2] = 10
    assert flicker(clip) == pytest.approx(10)


def test_dynamic_degree_follows_the_speed():
    slow, fast = (dynamic_degree(moving_disc(speed=speed)) for speed in (1.0, 2.0))
    assert fast == pytest.approx(100 * 2.0 / 64, rel=0.35)  # five warps of TV-L1 fall short by a quarter
    assert fast / slow == pytest.approx(2, rel=0.15)


def test_warping_error_forgives_motion_but_not_flashes():
    moving, flashing = moving_disc(speed=2), moving_disc(speed=2, flash=0.1)
    assert warping_error(moving) < 0.2 * float(np.square(np.diff(moving, axis=0)).mean() * 1e3)
    assert warping_error(flashing) > 10 * warping_error(moving)


def test_motion_smoothness_falls_with_jerks():
    assert motion_smoothness(moving_disc(speed=1)) > motion_smoothness(moving_disc(speed=1, jerk=3)) + 1e-3


@pytest.mark.parametrize("metric, frames", [(flicker, 1), (warping_error, 1), (dynamic_degree, 1), (motion_smoothness, 2)])
def test_too_short_a_clip_is_named(metric, frames):
    with pytest.raises(BadVideoError, match="needs at least"):
        metric(moving_disc(frames=frames))


@pytest.mark.parametrize("metric", [flicker, warping_error, dynamic_degree, motion_smoothness])
def test_bad_clips_are_named(metric):
    for bad in (moving_disc()[..., 0], moving_disc() * 300, moving_disc()[:0], moving_disc().astype(int)):
        with pytest.raises(BadVideoError):
            metric(bad)
