"""Where the metrics of a pair compute: NumPy, or a framework's tensors on one of its devices, by the same lines of code."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...video import UINT8_MAX, as_unit, checked, checked_pair, same_shape

BLOCK = 8  # frames at once on a GPU; the float64 maps of SSIM take some twenty times their room
PIXELS = (-3, -2, -1)  # the axes of a frame [..., H, W, 3]


@dataclass(frozen=True)
class Device:
    """A device of a framework.

    framework: "torch" or "paddle". name: what the framework calls it, such as "cuda", "gpu:0" or "cpu".
    """

    framework: str
    name: str

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Any]:
        """Without gradients and in whole float32, not TF32; gives the framework's `nn.functional`."""
        if self.framework == "torch":
            import torch

            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield torch.nn.functional
        else:
            import paddle

            before = paddle.get_device()
            paddle.set_device(self.name)
            try:
                with paddle.no_grad():
                    yield paddle.nn.functional
            finally:
                paddle.set_device(before)

    def put(self, video):
        """A video there, checked and as it came: what the metrics take in its place, and need not put there one by one.

        Raises:
            BadVideoError: see `video.checked`.
        """
        with self.at_work():
            return self.tensor(checked(video))

    def tensor(self, array: np.ndarray):
        """The array there; of Paddle inside `at_work`."""
        if self.framework == "torch":
            import torch

            return torch.from_numpy(np.ascontiguousarray(array)).to(self.name)
        import paddle

        return paddle.to_tensor(array)

    def cast(self, tensor, dtype: str):
        """The tensor as another type, such as "float64"."""
        if self.framework == "torch":
            import torch

            return tensor.to(getattr(torch, dtype))
        return tensor.astype(dtype)

    def unit(self, frames):
        """`video.as_unit` of frames that are there."""
        wide = self.cast(frames, "float64")
        return wide / UINT8_MAX if "uint8" in str(frames.dtype) else wide.clip(0.0, 1.0)


def blocks(video, reference, device: Device | None = None) -> Iterator[tuple]:
    """The frames of a pair as float64 [n, H, W, 3] in [0, 1]: arrays or, inside its `at_work`, a device's tensors, at most
    BLOCK frames on a GPU, and one on a CPU, whose cache holds it.

    Args:
        video, reference: [F, H, W, 3], arrays or what `device` gave of both by `put`.

    Raises:
        BadVideoError: see `video.checked_pair`.
    """
    if hasattr(video, "cpu") and hasattr(reference, "cpu"):
        pair = same_shape(video, reference)
    else:
        pair = checked_pair(video, reference)
        pair = map(device.tensor, pair) if device else pair
    video, reference = pair
    count, unit = BLOCK if device and device.name != "cpu" else 1, device.unit if device else as_unit
    for start in range(0, len(video), count):
        yield unit(video[start : start + count]), unit(reference[start : start + count])


def as_array(rows) -> np.ndarray:
    """An array or a tensor of any device as an array."""
    return np.asarray(rows.cpu() if hasattr(rows, "cpu") else rows)


def at_work(device: Device | None) -> contextlib.AbstractContextManager:
    """`Device.at_work`, of NumPy too."""
    return device.at_work() if device else contextlib.nullcontext()


def device_of(context) -> Device | None:
    """Where a metric's context says that pairs are compared."""
    return context.device if context else None
