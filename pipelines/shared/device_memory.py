"""What a device tells of its memory: the most that was allocated in a stage, and what is free."""
from __future__ import annotations

import paddle

GIB = 2**30


def tells(device: str) -> bool:
    """Whether Paddle counts what is allocated on the device ("gpu:0", or one of a plug-in); on a CPU it does not."""
    return device != "cpu"


def restart_peak(device: str) -> None:
    """Counts the peak from what is allocated now; where the device tells of none, does nothing."""
    if tells(device):
        paddle.device.cuda.reset_max_memory_allocated(device)


def peak_gib(device: str) -> float | None:
    """The most that tensors took on the device since `restart_peak`, weights included, GiB; None where it tells of none."""
    return paddle.device.cuda.max_memory_allocated(device) / GIB if tells(device) else None
