"""`lowbit-video doctor`: complete, true, and never failing."""
import json
import subprocess
import sys
import types

import numpy as np
import pytest

from lowbit_video.app import cli, doctor
from lowbit_video.distributed.cost.models import MODELS
from lowbit_video.kernels.variants import VARIANTS


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Frameworks take seconds to import; one test looks at them for real."""
    monkeypatch.setattr(doctor, "frameworks", lambda: {"paddle": "cpu (this build has no CUDA)"})


def test_the_report_covers_machine_packages_and_every_kernel(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("Python 3", "numpy", "triton", "matplotlib", *(variant.name for variant in VARIANTS)):
        assert word in out


def test_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"machine", "packages", "frameworks", "gpus", "shipped", "kernels", "models", "advice"} == set(report)
    assert {entry["kernel"] for entry in report["kernels"]} == {variant.name for variant in VARIANTS}


def test_an_encoder_that_fails_is_told(monkeypatch):
    assert not any("No video" in line for line in doctor.advice([]))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    assert any("No video can be written" in line and "/nowhere/ffmpeg" in line for line in doctor.advice([]))


def test_a_numpy_that_paddle_cannot_use_is_told(monkeypatch):
    paddle = types.SimpleNamespace(ones=lambda shape: np.ones(shape, np.float32)[0])
    monkeypatch.setitem(sys.modules, "paddle", paddle)
    assert not any("numpy" in line for line in doctor.advice([]))

    def one_element(shape):
        assert shape == [1]
        return types.SimpleNamespace()  # as it has no __float__, float() raises TypeError

    paddle.ones = one_element
    assert any(f"under numpy {np.__version__}: pip install 'numpy<2.4'" in line for line in doctor.advice([]))
    monkeypatch.setattr(doctor, "frameworks", dict)
    assert not any("numpy" in line for line in doctor.advice([]))


def test_the_cpu_runs_the_reference_and_names_why_not_the_others():
    by_name = {entry["kernel"]: entry for entry in doctor.kernels([])}
    assert by_name["reference-lowbit"]["why_not"] is None
    assert by_name["triton-int-fp16"]["why_not"] == "it needs an NVIDIA GPU"


def test_an_ampere_gpu_is_told_what_its_arch_lacks():
    entries = {entry["kernel"]: entry["why_not"] for entry in doctor.kernels([(8, 0)]) if entry["place"] == "sm_80"}
    assert entries["triton-int-fp16"] is None and entries["triton-exact"] is None
    assert "sm_89" in entries["triton-int-fp8"]
    assert entries["reference-lowbit"] == "it runs on CPU tensors only"


def fake_smi(monkeypatch, stdout, code=0):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code, stdout, ""))


def test_gpus_are_read_from_the_driver(monkeypatch):
    fake_smi(monkeypatch, "NVIDIA H200, 9.0, 143771\nNVIDIA A100, 8.0, 81920\n")
    assert [gpu["arch"] for gpu in doctor.gpus()] == [(9, 0), (8, 0)]
    report = doctor.render(doctor.examine())
    assert "NVIDIA H200, sm_90, 140.4 GiB" in report and "this Paddle cannot use it" in report


@pytest.mark.parametrize("memory_mib, fits", [
    (81559, ("as it is", "as it is", "as it is")), (40960, ("as it is", "as it is", "with --low-memory")),
    (24564, ("as it is", "with --low-memory", "with --low-memory")), (16376, ("with --low-memory",) * 2 + ("not at all",)),
    (12288, ("with --low-memory", "not at all", "not at all")), (8188, ("not at all",) * 3)])
def test_how_models_fit_on_a_gpu(monkeypatch, memory_mib, fits):
    fake_smi(monkeypatch, f"GPU A, 9.0, {memory_mib}\nGPU A, 9.0, {memory_mib}\n")
    report = doctor.examine()
    assert [(one["model"], one["fits"]) for one in report["models"]] == [*zip(MODELS, fits)]  # once for two of a kind
    first = report["models"][0]
    gib = f"{first['whole_gib']}, {first['low_memory_gib']} of {round(memory_mib / 1024, 1)}"
    assert f"  CogVideoX-2b      {fits[0]} on GPU A: {gib}\n" in doctor.render(report)


def test_models_are_told_of_gpus_of_known_memory_only(monkeypatch):
    fake_smi(monkeypatch, "GPU A, 9.0, [N/A]\n")
    assert doctor.examine()["models"] == []
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    report = doctor.examine()
    assert report["models"] == [] and "--low-memory" not in doctor.render(report)


@pytest.mark.parametrize("stdout, code", [("", 9), ("NVIDIA-SMI has failed, because it could not talk\n", 9), ("a, b, c\n", 0),
                                          ("NVIDIA H200, [N/A], 1\n", 0)])
def test_a_broken_driver_is_no_failure(monkeypatch, capsys, stdout, code):
    fake_smi(monkeypatch, stdout, code)
    assert doctor.gpus() == []
    assert cli.main(["doctor"]) == 0


def test_a_probe_that_raises_is_reported(monkeypatch, capsys):
    def broken(*args):
        raise OSError("the disk is on fire")

    for name in ("gpus", "packages", "frameworks", "kernels", "models", "advice"):
        monkeypatch.setattr(doctor, name, broken)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.count("OSError: the disk is on fire") == 6


def test_missing_packages_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    entries = {entry["package"]: entry["version"] for entry in doctor.packages()}
    assert "pip install '.[eval]' from the checkout" in entries["matplotlib"]
    assert any("Pipelines need Paddle" in line for line in doctor.advice([]))


@pytest.mark.parametrize("version, told", [("3.6.0", False), ("3.9.1", False), (None, False), ("3.10.0", True)])
def test_a_triton_whose_launches_are_not_repeated_is_told(monkeypatch, version, told):
    from lowbit_video.kernels.shipped import choice

    monkeypatch.setattr(choice, "triton_version", lambda: version)
    device = dict(name="GPU", arch=(9, 0), memory_gib=80)
    assert any(f"Triton {version} is not known" in line for line in doctor.advice([device])) == told
    assert not any("is not known" in line for line in doctor.advice([]))


def test_who_serves_is_told(monkeypatch, capsys):
    from lowbit_video.kernels.shipped import choice

    choice.chosen.cache_clear()
    monkeypatch.setenv(choice.ENVIRONMENT, "shipped")
    try:
        for command in ("doctor", "kernels"):
            assert cli.main([command]) == 0
            out = capsys.readouterr().out
            assert "kernels are shipped compiled for sm_90a (triton 3.6.0" in out and "LOWBIT_VIDEO_KERNELS is 'shipped'" in out
        assert cli.main(["doctor", "--json"]) == 0
        why = {entry["kernel"]: entry["why_not"] for entry in doctor.kernels([(9, 0)]) if entry["place"] == "sm_90"}
        assert why["hopper-int8"] is None and "not shipped compiled" in why["triton-exact"]
    finally:
        choice.chosen.cache_clear()
