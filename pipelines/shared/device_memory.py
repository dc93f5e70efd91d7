"""What a device tells of its memory: the most that was allocated in a stage, and what is free."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import paddle

GIB = 2**30


def tells(device: str) -> bool:
    """Whether Paddle counts what is allocated on the device ("gpu:0", or one of a plug-in); on a CPU it does not."""
    return device != "cpu"


def restart_peak(device: str) -> None:
    """Counts the peak from what is allocated now; where the device tells of none, does nothing."""
    _asked(paddle.device.cuda.reset_max_memory_allocated, device)


def free_bytes(device: str) -> int | None:
    """What the device has beyond this process's tensors; None where Paddle does not say how large it is (a CPU, a plug-in)."""
    if not device.startswith("gpu"):
        return None
    device = _numbered(device)
    total = paddle.device.cuda.get_device_properties(device).total_memory
    return total - paddle.device.cuda.memory_allocated(device)


def release_cached(device: str) -> None:
    """Gives memory that the allocator keeps for later back to the device, so that tensors of other sizes find room."""
    if tells(device):
        paddle.device.cuda.empty_cache()


def peak_gib(device: str) -> float | None:
    """The most that tensors took on the device since `restart_peak`, weights included, GiB; None where it tells of none."""
    peak = _asked(paddle.device.cuda.max_memory_allocated, device)
    return None if peak is None else peak / GIB


def _asked(counter: Callable[[str], Any], device: str) -> Any:
    """What a counter says; None of a device that Paddle has none of: no video is to fail for it."""
    if tells(device):
        with contextlib.suppress(ValueError, RuntimeError):
            return counter(_numbered(device))
    return None


def _numbered(device: str) -> str:
    """The device with its number, which Paddle's counters ask for: of "gpu" the current one."""
    if ":" in device:
        return device
    current = paddle.get_device()
    return current if current.startswith(f"{device}:") else f"{device}:0"
