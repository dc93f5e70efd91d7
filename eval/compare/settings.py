"""What is asked of the pipeline for every video of an evaluation, and the machine it ran on."""
from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from lowbit_video import __version__
from lowbit_video.pipelines.shared.generation import read_generation

DEFAULT_FPS = 8


@dataclass(frozen=True)
class Settings:
    """The pipeline's arguments; None leaves one to the pipeline.

    model: folder or name, for the record. steps: denoising steps. guidance: classifier-free guidance scale.
    frames, height, width: of the video. fps: frames a second of the clips.
    """

    model: str = ""
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float = DEFAULT_FPS

    def arguments(self) -> dict:
        """The pipeline's keyword arguments."""
        named = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "num_frames": self.frames,
                 "height": self.height, "width": self.width}
        return {name: value for name, value in named.items() if value is not None}

    def as_dict(self) -> dict:
        """Plain values, for the record."""
        return asdict(self)


def for_model(folder, **asked) -> Settings:
    """Settings for a model folder: what was asked for, else the folder's generation.json, else the pipeline's own.

    Raises:
        ValueError: a generation.json that is not a JSON object.
    """
    values = {**read_generation(folder), **{name: value for name, value in asked.items() if value is not None}}
    values = {name: values.get(name) for name in ("steps", "guidance", "frames", "height", "width", "fps")}
    return Settings(model=str(folder), **{**values, "fps": values["fps"] or DEFAULT_FPS})


def environment() -> dict:
    """Machine, versions and commit, as far as they can be read without asking a device."""
    versions = {"python": platform.python_version(), "lowbit-video": __version__}  # which need not be installed
    for package in ("paddlepaddle", "paddlepaddle-gpu", "torch", "numpy", "triton", "scikit-image"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"machine": processor_name(), "cores": os.cpu_count(), "device": device_name(), "versions": versions,
            "commit": commit()}


def processor_name() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def device_name() -> str:
    """Where Paddle computes, if it is loaded; its current device otherwise unnamed."""
    paddle = sys.modules.get("paddle")
    return str(paddle.device.get_device()) if paddle else "cpu"


def commit() -> str | None:
    """The checkout's commit, with a "+" if files were changed; None outside a checkout. LOWBIT_VIDEO_COMMIT goes before it, for
    copies of a tree."""
    if named := os.environ.get("LOWBIT_VIDEO_COMMIT"):
        return named
    try:
        folder = Path(__file__).resolve().parent
        run = lambda *words: subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
        head = run("rev-parse", "--short", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if run("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        return None
