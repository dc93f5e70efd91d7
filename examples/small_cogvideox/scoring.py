"""Scoring beside making: a video and its exact twin are compared on the GPU that made them, the rest is for worker processes.

AlexNet on twice 49 frames of 384 x 512 takes a core eight seconds, and SSIM two; what a scene shows takes it half a second."""
from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lowbit_video.eval.compare.clips import write_lossless
from lowbit_video.eval.compare.paired import figures
from lowbit_video.eval.metrics import registry
from lowbit_video.eval.metrics.shared.context import Context
from lowbit_video.eval.metrics.shared.device import BLOCK, Device
from lowbit_video.eval.video import checked
from lowbit_video.kernels.blas_threads import one_blas_thread
from lowbit_video.pipelines.shared.video_files import BadFramesError

TRIED = BLOCK + 1  # frames that a device is tried with: a whole block, and a part of one
SAME_FIGURE = 1e-4  # relative distance up to which a device's figure is the CPU's: that of a network's other float32 kernels
PATIENCE = 600.0  # seconds that a worker may take for a video
MODELS: dict = {}  # what metrics have loaded in this process


def measured(video: Path, reference: Path | None, context: Context, metrics: Sequence[str], begun: dict, clip: Path | None,
             fps: float, keep: bool) -> dict:
    """What is to be recorded of a video that lies in a file: its figures, or why there are none. The file is removed unless it
    is to keep.

    reference: the file of the exact video, or None for what has no use for it. begun: figures that are there already."""
    frames = np.load(video)
    context.models = MODELS
    line = {}
    try:
        checked(frames)
        with one_blas_thread():
            found = figures(frames, None if reference is None else np.load(reference), [registry.metric(m) for m in metrics],
                            context)
        line = {name: {**begun.get(name, {}), **values} for name, values in found.items()}
        if clip:
            write_lossless(clip, frames, fps)
            line["clip"] = f"{clip.parent.name}/{clip.name}"
    except BadFramesError as error:  # NaN is a result, and a bad one
        line["error"] = str(error)
    if not keep:
        video.unlink()
    return line


def compared(video, reference, metrics: Sequence[str], context: Context) -> dict:
    """The figures of a pair, of those metrics that look at one: arrays, or what the context's device gives of them by `put`."""
    context.models = MODELS
    return figures(video, reference, [m for m in map(registry.metric, metrics) if m.kind == "paired"], context)


def settle() -> None:
    """A worker computes on one core."""
    torch.set_num_threads(1)


class Workers:
    """Processes that measure videos; made before the first use of the GPU, since they are forked."""

    def __init__(self, count: int):
        self.pool = multiprocessing.get_context("fork").Pool(count, settle) if count > 1 else None

    def start(self, *job) -> Callable[[], dict]:
        """A function that gives `measured(*job)`."""
        if self.pool is None:
            return lambda: measured(*job)
        answer = self.pool.apply_async(measured, job)
        return lambda: answer.get(PATIENCE)

    def close(self) -> None:
        if self.pool:
            self.pool.terminate()


def gpu_of(maker) -> Device | None:
    """The GPU beside a maker that could compare videos: PyTorch's, which makes videos or is there beside Paddle's, or Paddle's
    own; None for a maker on a CPU."""
    name = str(maker.pipe.device)
    if name == "cpu":
        return None
    if maker.framework == "torch" or torch.cuda.is_available():
        return Device("torch", name if maker.framework == "torch" else "cuda")
    return Device(maker.framework, name)


def trusted(device: Device | None, metrics: Sequence[str], weights: dict[str, str], height: int, width: int) -> Device | None:
    """The device, if it has room for a pair of this size and gives the CPU's figures; else None, and a line that says why."""
    if device is None:
        return None
    noise = np.random.default_rng(0).random((2, TRIED, height, width, 3), np.float32)
    pair = 0.3 * noise[0] + 0.5, 0.3 * noise[0] + 0.5 + 0.1 * noise[1]
    try:
        found, wanted = (compared(*pair, metrics, Context(weights=weights, device=where))["figures"]
                         for where in (device, None))
        apart = [f"{name} is {found[name]:.6g}, not {value:.6g}" for name, value in wanted.items()
                 if not np.isclose(found[name], value, rtol=SAME_FIGURE, atol=0)]
    except Exception as error:  # whatever the framework raises: the workers can do it
        apart = [f"{type(error).__name__}: {str(error)[:300]}"]
    if apart:
        print(f"workers compare the videos, not {device.framework}'s {device.name}: {'; '.join(apart)}", flush=True)
    return None if apart else device
