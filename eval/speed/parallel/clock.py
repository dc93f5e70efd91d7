"""Where the ranks of a benchmark meet, and how they time a call together."""
from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit_video.distributed.group import Group, Traffic
from lowbit_video.runtime import cuda_driver, detect

from ..timing import L2_BYTES

AHEAD_PASSES = 48
"""Times that the L2 cache is overwritten before each run: about 5 ms, in which the host gets ahead of the device, as it is in a
whole step."""
ROUNDS = 12
"""Turns of every call."""


def wire_and_like(framework: str) -> tuple[Any, Any]:
    """(the wire of the ranks that were launched, a tensor on this rank's GPU)."""
    if framework == "torch":
        import torch

        from lowbit_video.distributed.torch_wire import TorchWire

        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)
        return TorchWire(), torch.zeros(64, device=device)
    import paddle

    from lowbit_video.distributed.paddle_wire import paddle_wire

    wire = paddle_wire()
    return wire, paddle.zeros([64], dtype="float32")


class Clock:
    """Times calls on every rank at once. world: of all ranks."""

    def __init__(self, wire: Any, like: Any) -> None:
        self.world, self.like = Group(wire, range(wire.size), Traffic()), like
        self.runtime = detect.runtime_of(like)
        self.stream = self.runtime.stream(like)
        self.flush = self.runtime.empty((L2_BYTES,), "uint8", like)

    def once(self, call: Callable[[], object], passes: int = AHEAD_PASSES) -> float:
        """ms of one call, from a cold L2 cache, begun on all ranks together."""
        begin, end = cuda_driver.Event(), cuda_driver.Event()
        cuda_driver.synchronize(self.stream)
        self.world.barrier()
        for _ in range(passes):
            cuda_driver.fill_bytes(self.flush.data_ptr(), 0, L2_BYTES, self.stream)
        begin.record(self.stream)
        call()
        end.record(self.stream)
        cuda_driver.synchronize(self.stream)
        return begin.elapsed_ms(end)

    def together(self, calls: dict[str, Callable[[], object]], rounds: int = ROUNDS, passes: int = AHEAD_PASSES,
                 around: Callable[[str], Any] | None = None) -> dict[str, float]:
        """Median ms of the slowest rank, of each call; in turns, every other round backwards.

        around: `around(name)` is entered for the turn of a call, which then begins with a run that does not count.
        """
        if not calls:
            return {}
        for _ in range(2 if around is None else 0):
            for call in calls.values():
                call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in list(calls)[::-1 if turn % 2 else 1]:
                if around is None:
                    times[name].append(self.once(calls[name], passes))
                    continue
                with around(name):
                    calls[name]()
                    times[name].append(self.once(calls[name], passes))
        return self.medians(times)

    def medians(self, times: dict[str, list[float]]) -> dict[str, float]:
        """The median over turns of the slowest rank's time, of each call."""
        slowest = np.max(self.everyone(np.array(list(times.values()), np.float32)), axis=0)
        return {name: statistics.median(map(float, slowest[number])) for number, name in enumerate(times)}

    def peaks(self, own: dict[str, float]) -> dict[str, list[float] | None]:
        """Everyone's GiB by rank, of each call; None where no rank has any."""
        by_rank = np.array(self.everyone(np.array(list(own.values()), np.float32)))
        return {name: None if np.isnan(by_rank[:, number]).any() else by_rank[:, number].tolist()
                for number, name in enumerate(own)}

    def everyone(self, own: np.ndarray) -> list[np.ndarray]:
        """Every rank's float32 array of one shape."""
        sent = self.runtime.from_numpy(own, self.like, "float32")
        return [self.runtime.to_numpy(one) for one in self.world.all_gather(sent, self.runtime, "timing")]
