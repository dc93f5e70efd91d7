"""Paddle's wire: paddle.distributed, NCCL on GPUs (a custom device's own library too) and gloo on CPUs."""
from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.distributed as dist

from .wire import Done, Wire, Work


def paddle_wire() -> Wire:
    """The wire of the processes that `paddle.distributed.launch` started.

    Makes Paddle's parallel environment if the caller has not. Raises RuntimeError where nothing was launched.
    """
    if not dist.is_initialized():
        dist.init_parallel_env()
    if dist.get_world_size() < 2:
        raise RuntimeError("only one process runs: start several with `python -m paddle.distributed.launch "
                           "--nproc_per_node N` (CPU) or `--devices 0,1` (GPU)")
    if dist.get_backend() == "GLOO":
        from .paddle_gloo import GlooWire

        return GlooWire()
    return DeviceWire()


class DeviceWire:
    """Between GPUs: the default process group's own transfers."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def exchange(self, sent: paddle.Tensor, sent_bytes: Sequence[int], received: paddle.Tensor, received_bytes: Sequence[int]
                 ) -> Work:
        """See `Wire.exchange`."""
        return dist.stream.alltoall_single(received, sent, list(received_bytes), list(sent_bytes), sync_op=False)

    def send(self, tensor: paddle.Tensor, to: int) -> Work:
        """See `Wire.send`."""
        return dist.isend(tensor, dst=to) or Done()

    def receive(self, tensor: paddle.Tensor, source: int) -> Work:
        """See `Wire.receive`."""
        return dist.irecv(tensor, src=source) or Done()

    def barrier(self) -> None:
        """See `Wire.barrier`."""
        dist.barrier()
