"""`lowbit-video doctor`: what this machine can run, and why not. It reports problems and never fails on one."""
from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from typing import Any

from ..installing import pip_install
from .kernel_table import shipped_line

PACKAGES = (
    ("numpy", "numpy", "needed", ""),
    ("ml_dtypes", "ml_dtypes", "needed", ""),
    ("safetensors", "safetensors", "needed to read weights", ""),
    ("sentencepiece", "sentencepiece", "needed to read prompts", ""),
    ("imageio", "imageio", "needed to write mp4", ""),
    ("imageio_ffmpeg", "imageio-ffmpeg", "needed to write mp4", ""),
    ("triton", "triton", "compiles GPU kernels; those for sm_90 are shipped compiled", "Linux only"),
    ("paddle", "paddlepaddle", "the pipelines' framework", f"{pip_install('cpu')}; for a GPU see Paddle's own index"),
    ("torch", "torch", "optional: attention on torch tensors", pip_install("torch")),
    ("skimage", "scikit-image", "optional: evaluation", pip_install("eval")),
    ("matplotlib", "matplotlib", "optional: plots", pip_install("eval")),
)
"""Module, distribution, what it is for, how to get it."""


def _attempt(function: Any, *args: Any) -> Any:
    """The function's result, or the error as text: a report must not die of what it reports."""
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def packages() -> list[dict[str, str]]:
    """Every package of interest, its version or how to get it."""
    found = []
    for module, distribution, purpose, hint in PACKAGES:
        here = _attempt(importlib.util.find_spec, module)
        version = ""
        if here is not None and not isinstance(here, str):
            version = _version(module, distribution)
        state = version or "not installed" + (f" ({hint})" if hint else "")
        found.append({"package": distribution, "version": state, "for": purpose, "installed": bool(version)})
    return found


def _version(module: str, distribution: str) -> str:
    for name in (distribution, f"{distribution}-gpu"):
        try:
            return importlib.metadata.version(name) + (f" ({name})" if name != distribution else "")
        except importlib.metadata.PackageNotFoundError:
            continue
    loaded = _attempt(importlib.import_module, module)
    return loaded if isinstance(loaded, str) else str(getattr(loaded, "__version__", "installed"))


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs that the driver lists: name, arch (major, minor), memory_gib. Empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    found = []
    for line in result.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if result.returncode == 0 and len(parts) == 3 and parts[1].replace(".", "").isdigit():
            major, _, minor = parts[1].partition(".")
            memory = round(float(parts[2]) / 1024, 1) if parts[2].replace(".", "").isdigit() else None
            found.append({"name": parts[0], "arch": (int(major), int(minor or 0)), "memory_gib": memory})
    return found


def _paddle_devices() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paddle = importlib.import_module("paddle")
    parts = ["cpu"]
    if paddle.device.is_compiled_with_cuda():
        parts.append(f"{paddle.device.cuda.device_count()} CUDA GPUs")
    for kind in paddle.device.get_all_custom_device_type() or []:
        parts.append(f"custom device {kind}")
    text = ", ".join(parts)
    return text if len(parts) > 1 else f"{text} (this build has no CUDA)"


def _paddle_number() -> float:
    """One element as a number: what Paddle 3.3.1 cannot do under numpy 2.4 and later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, that it will be so later on
        return float(importlib.import_module("paddle").ones([1]))


def _torch_devices() -> str:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "cpu (no CUDA: the build has none, or there is no GPU)"
    return "cpu, " + ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def frameworks() -> dict[str, str]:
    """The devices that each installed framework sees."""
    found = {}
    for name, probe in (("paddle", _paddle_devices), ("torch", _torch_devices)):
        if _attempt(importlib.util.find_spec, name):
            found[name] = _attempt(probe)
    return found


def kernels(archs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """For every variant, the CPU and each GPU arch: None if it serves a CogVideoX-like call, else why not."""
    from lowbit_video.kernels.variants import VARIANTS, Request

    from ..precision import as_precision

    places = [("cpu", None)] + [("cuda", arch) for arch in dict.fromkeys(archs)]
    found = []
    for variant in VARIANTS:
        precision = as_precision(variant.specs[0])
        dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(precision.q, "float16")
        for device, arch in places:
            granularity = precision.granularity if precision.granularity in variant.granularities else variant.granularities[0]
            request = Request(device=device, arch=arch, q=precision.q, k=precision.k, pv=precision.pv, granularity=granularity,
                              dtype=dtype, head_dim=64, q_len=17776, kv_len=17776, heads=30, kv_heads=30,
                              smooth_q=precision.smooth_q)
            place = device if arch is None else f"sm_{arch[0]}{arch[1]}"
            found.append({"kernel": variant.name, "place": place, "precisions": list(variant.specs),
                          "why_not": _attempt(variant.why_not, request)})
    return found


def models(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every known model and kind of GPU: how a video of its default size fits, and the GiB that each way needs."""
    from ..distributed.cost.memory import needed_gib
    from ..distributed.cost.models import MODELS

    found = []
    for name, memory_gib in dict.fromkeys((device["name"], device["memory_gib"]) for device in devices):
        for model in MODELS.values() if memory_gib is not None else ():
            whole, low = needed_gib(model)
            how = "as it is" if whole <= memory_gib else "with --low-memory" if low <= memory_gib else "not at all"
            found.append({"model": model.name, "gpu": name, "memory_gib": memory_gib, "fits": how,
                          "whole_gib": round(whole, 1), "low_memory_gib": round(low, 1)})
    return found


def examine() -> dict[str, Any]:
    """Everything the report shows."""
    devices = _attempt(gpus)
    listed = devices if isinstance(devices, list) else []
    memory = _attempt(lambda: round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1))
    return {
        "machine": {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(),
                    "memory_gib": memory},
        "packages": _attempt(packages),
        "frameworks": _attempt(frameworks),
        "gpus": devices,
        "shipped": _attempt(shipped_line),
        "kernels": _attempt(kernels, [device["arch"] for device in listed]),
        "models": _attempt(models, listed),
        "advice": _attempt(advice, listed),
    }


def advice(devices: list[dict[str, Any]]) -> list[str]:
    """What to do next, plainest first."""
    from lowbit_video.kernels.compiled import known
    from lowbit_video.kernels.shipped.choice import triton_version
    from lowbit_video.pipelines.shared.video_files import check_writable

    said = []
    installed = {entry["package"] for entry in packages() if entry["installed"]}
    seen = frameworks()
    if "paddlepaddle" not in installed:
        said.append(f"Pipelines need Paddle: {pip_install('cpu')}, or paddlepaddle-gpu from Paddle's own index.")
    if not devices:
        said.append("No NVIDIA GPU: attention runs through the NumPy reference on the CPU. It is right, and slow.")
    elif "paddle" in seen and "CUDA" not in seen["paddle"].replace("no CUDA", "") and "custom" not in seen["paddle"]:
        said.append("There is a GPU, but this Paddle cannot use it: install paddlepaddle-gpu from Paddle's own index.")
    if "paddle" in seen and isinstance(_attempt(_paddle_number), str):
        said.append(f"This Paddle cannot read a tensor of one element under numpy {_version('numpy', 'numpy')}: "
                    "pip install 'numpy<2.4'.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            check_writable(os.path.join(folder, "try.mp4"), fps=8)
    except (ImportError, OSError) as error:
        said.append(f"No video can be written: {error}.")
    version = triton_version()
    if devices and version is not None and not known(version):
        said.append(f"Triton {version} is not known: calls of what it compiles go through its own launcher, which takes the "
                    "host longer than a plan. Those of 3.6 to 3.9 are repeated.")
    if devices and "triton" not in installed:
        said.append("Without Triton only what is shipped compiled runs on a GPU, on sm_90: pip install triton for all else.")
    return said


def render(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    machine = report["machine"]
    lines = [f"Python {machine['python']} on {machine['system']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB memory",
             "", "Packages"]
    if isinstance(report["packages"], list):
        lines += [f"  {p['package']:<15} {p['version']:<12} {p['for']}" for p in report["packages"]]
    else:
        lines.append(f"  {report['packages']}")
    lines += ["", "Frameworks see"]
    seen = report["frameworks"]
    lines += [f"  {name:<15} {text}" for name, text in seen.items()] if isinstance(seen, dict) else [f"  {seen}"]
    devices = report["gpus"]
    lines += ["", "NVIDIA GPUs"]
    if isinstance(devices, list):
        lines += [f"  {d['name']}, sm_{d['arch'][0]}{d['arch'][1]}, {d['memory_gib']} GiB" for d in devices] or ["  none found"]
    else:
        lines.append(f"  {devices}")
    lines += ["", "Kernels (for a CogVideoX-2b call: head dim 64, 17776 tokens)"]
    if isinstance(report["kernels"], list):
        for entry in report["kernels"]:
            state = f"runs: {', '.join(entry['precisions'])}" if entry["why_not"] is None else f"no: {entry['why_not']}"
            lines.append(f"  {entry['kernel']:<17} {entry['place']:<7} {state}")
    else:
        lines.append(f"  {report['kernels']}")
    lines.append(f"  {report['shipped']}")
    if isinstance(report["models"], str):
        lines += ["", f"Models: {report['models']}"]
    elif report["models"]:
        lines += ["", "CogVideoX in Paddle (16 bit, a guided video of the default size; GiB reckoned: all parts, low memory)"]
        lines += [f"  {entry['model']:<17} {entry['fits']} on {entry['gpu']}: {entry['whole_gib']}, {entry['low_memory_gib']} "
                  f"of {entry['memory_gib']}" for entry in report["models"]]
    if report["advice"]:
        said = report["advice"] if isinstance(report["advice"], list) else [report["advice"]]
        lines += ["", *said]
    return "\n".join(lines)


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Registers `lowbit-video doctor`."""
    parser = subparsers.add_parser("doctor", help="what this machine can run, and why not")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; the exit status is 0 whatever it says."""
    report = examine()
    print(json.dumps(report, indent=1) if args.json else render(report))
    return 0
