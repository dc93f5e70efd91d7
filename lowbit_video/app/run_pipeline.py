"""A pipeline as a job asks for it, and one run of it: where it computes, in which dtype, how long each stage takes."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_video import pipelines
from lowbit_video.pipelines.shared.folders import find_folder

from .. import coverage
from ..files import read_json
from ..runtime.detect import default_paddle_device
from .job import Job


def resolve_device(name: str) -> str:
    """Paddle's name of the device, made the current one. ValueError lists what there is."""
    import paddle

    name = default_paddle_device() if name == "auto" else name
    try:
        paddle.set_device(name)
    except Exception as error:
        there = ["cpu", *paddle.device.get_available_device()]
        raise ValueError(f"device {name!r} is not available to this Paddle; there are: {', '.join(dict.fromkeys(there))}; "
                         "`lowbit-video doctor` says why") from error
    return paddle.get_device()


def resolve_dtype(name: str, device: str, folder: str) -> str:
    """The weights' dtype: float32 on a CPU; else as published, bfloat16 with rotary positions and float16 without.

    folder: or a hub id, of which the transformer's configuration is fetched.
    """
    if name != "auto":
        return name
    if device == "cpu":
        return "float32"
    file = "transformer/config.json"
    config = Path(find_folder(folder, file), file)
    rotary = config.is_file() and read_json(config).get("use_rotary_positional_embeddings")
    return "bfloat16" if rotary else "float16"


def load_pipeline(job: Job, dtype: str, device: str) -> tuple[Any, float]:
    """(the pipeline of the job's model, compiled if asked for, seconds that it took)."""
    start = time.perf_counter()
    pipe = pipelines.load(job.model, dtype=dtype, device=device, low_memory=job.low_memory)
    if job.compile:
        pipe.compile()
    return pipe, time.perf_counter() - start


@dataclass
class Run:
    """One run of the pipeline: video float32 [F, H, W, 3] in [0, 1], seconds by stage, the coverage report.

    memory: GiB that the device held at most, by stage; empty where it does not tell.
    """

    video: np.ndarray
    seconds: dict[str, float]
    memory: dict[str, float]
    coverage: Any


def run_pipeline(pipe: Any, job: Job, progress: bool = True) -> Run:
    """Runs the job's prompt, through the hook if `pipe` is hooked.

    Raises ValueError for sizes that the model does not make (before the work) and for a video with NaN.
    """
    wanted = {"negative_prompt": job.negative_prompt, "num_inference_steps": job.steps, "guidance_scale": job.guidance,
              "num_frames": job.frames, "height": job.height, "width": job.width}
    result = pipe(job.prompt, seed=job.seed, output_type="np", progress=progress,
                  **{name: value for name, value in wanted.items() if value is not None})
    video = result.frames[0]
    broken = int(video.size - np.count_nonzero(np.isfinite(video)))
    if broken:
        raise ValueError(f"the video has {broken} NaN or infinite values of {video.size}; try --dtype float32, or "
                         "--precision exact to see whether attention is the cause")
    return Run(video, dict(result.timings), dict(result.memory), coverage(pipe))


def timed(function: Callable, *args: Any) -> float:
    """Calls the function; returns the seconds that it took."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def seconds_line(seconds: dict[str, float], steps: int | None) -> str:
    """Seconds by stage as a line; of denoising also the seconds a step."""
    text = ", ".join(f"{stage.replace('_', ' ')} {value:.2f}" for stage, value in seconds.items())
    if steps and seconds.get("denoise"):
        text += f" ({seconds['denoise'] / steps:.2f} a step)"
    return f"seconds: {text}"


def memory_line(memory: dict[str, float], device: str) -> str:
    """Peak memory by stage as a line, or that the device does not tell of it."""
    if not memory:
        return f"peak memory: Paddle does not count it on {device}"
    return "peak memory, GiB: " + ", ".join(f"{stage.replace('_', ' ')} {value:.2f}" for stage, value in memory.items())
