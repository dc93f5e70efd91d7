"""Kernel-level metrics: hand-made values, axes, edge cases; and that the registry finds every metric."""
import numpy as np
import pytest

from lowbit_video.eval.metrics import registry
from lowbit_video.eval.metrics.shared.tensor import BadTensorError

TENSOR = {m.name: m.module.measure for m in registry.of_kind("tensor")}


def test_every_metric_declares_itself():
    found = registry.metrics()
    assert {"psnr", "ssim", "ms_ssim", "lpips", "clipsim", "clip_temporal", "vqa", "fvd", "flicker", "warping_error",
            "motion_smoothness", "dynamic_degree", "adherence"} | set(TENSOR) == set(found)
    assert set(TENSOR) == {"cosine", "relative_l1", "rmse", "sqnr", "max_error"}
    assert all(m.higher_is_better in (True, False, None) for m in found.values())


def test_values_by_hand():
    reference, output = np.array([3.0, -4.0]), np.array([3.0, -3.0])
    expected = {"cosine": 21 / (5 * 18**0.5), "relative_l1": 1 / 7, "rmse": 0.5**0.5, "sqnr": 10 * np.log10(25), "max_error": 1}
    assert {name: float(f(output, reference)) for name, f in TENSOR.items()} == pytest.approx(expected)


@pytest.mark.parametrize("name", TENSOR)
def test_axes_and_identity(name):
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 4))
    assert TENSOR[name](x * 1.1, x, axis=(0, 1, 3)).shape == (3,)
    assert np.allclose(TENSOR[name](x, x), registry.metric(name).perfect)
    zeros = np.zeros((2, 3))
    assert np.isfinite(TENSOR[name](zeros, zeros))


@pytest.mark.parametrize("name", TENSOR)
def test_bad_arrays_are_named(name):
    x = np.ones((2, 3))
    for output, reference, words in ((x, x[:1], "shapes must be equal"), (x[:0], x[:0], "empty"),
                                     (x * np.nan, x, "output holds 6"), (x, x * np.inf, "reference holds 6")):
        with pytest.raises(BadTensorError, match=words):
            TENSOR[name](output, reference)


def test_unknown_and_unready_metrics_say_what_to_do():
    with pytest.raises(ValueError, match="no metric 'psnrr'; there are: adherence"):
        registry.choose(["psnrr"], {})
    with pytest.raises(ValueError, match="lpips needs --weights lpips=PATH"):
        registry.choose(["psnr", "lpips"], {})
    usable, lacking = registry.choose(None, {"clip": "/no/such/folder"})
    assert {"psnr", "ssim"} <= {m.name for m in usable}
    assert "no such file or folder" in lacking["clipsim"] and "vqa=PATH" in lacking["vqa"]
