"""The most memory that tensors have on this rank's GPU, by the count of the framework's allocator."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lowbit_video.runtime.protocol import Runtime


@contextlib.contextmanager
def counted(runtime: Runtime, peaks: dict[str, float], name: str) -> Iterator[None]:
    """Inside, the peak is counted anew; afterwards peaks[name] is that, weights included, GiB; nan where nothing counts."""
    if runtime.NAME == "torch":
        import torch

        there = torch.cuda.is_available()
        if there:
            torch.cuda.reset_peak_memory_stats()
        yield
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if there else float("nan")
        return
    import paddle

    from lowbit_video.pipelines.shared import device_memory

    device = paddle.get_device()
    device_memory.restart_peak(device)
    yield
    peak = device_memory.peak_gib(device)
    peaks[name] = float("nan") if peak is None else peak
