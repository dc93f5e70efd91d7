"""PyTorch's wire: torch.distributed, NCCL on GPUs and gloo on CPUs."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .wire import Work


class Batch:
    """Several transfers as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class TorchWire:
    """The default process group, which the caller has made (`torch.distributed.init_process_group`).

    Raises RuntimeError where there is none.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed has no process group: start with torchrun, call init_process_group() first")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.grouped = dist.get_backend() == "nccl"  # gloo has no all-to-all

    def exchange(self, sent: torch.Tensor, sent_bytes: Sequence[int], received: torch.Tensor, received_bytes: Sequence[int]
                 ) -> Work:
        """See `Wire.exchange`."""
        if self.grouped:
            return dist.all_to_all_single(received, sent, list(received_bytes), list(sent_bytes), async_op=True)
        outgoing, incoming = sent.split(list(sent_bytes)), received.split(list(received_bytes))
        operations = []
        for rank in range(self.size):
            if sent_bytes[rank]:
                operations.append(dist.P2POp(dist.isend, outgoing[rank], rank))
            if received_bytes[rank]:
                operations.append(dist.P2POp(dist.irecv, incoming[rank], rank))
        return Batch(dist.batch_isend_irecv(operations) if operations else ())

    def send(self, tensor: torch.Tensor, to: int) -> Work:
        """See `Wire.send`."""
        return dist.isend(_bytes(tensor), to)

    def receive(self, tensor: torch.Tensor, source: int) -> Work:
        """See `Wire.receive`."""
        return dist.irecv(_bytes(tensor), source)

    def barrier(self) -> None:
        """See `Wire.barrier`."""
        dist.barrier()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
