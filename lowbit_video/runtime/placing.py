"""Launches of kernels that were shipped compiled go to the CUDA driver, on a framework's device and stream."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from lowbit_video.kernels.launch import placed
from lowbit_video.kernels.shipped.choice import ARCH, chosen
from lowbit_video.kernels.shipped.launch import Place

from . import cuda_driver


def place(ordinal: int, stream: Callable[[], int]) -> Place | None:
    """Where a CUDA device's launches of shipped kernels go; None where Triton compiles everything, as for other archs.

    stream(): the raw handle of the framework's current stream there.
    """
    if not chosen().shipped or cuda_driver.capability(ordinal) != ARCH:
        return None
    return Place(cuda_driver, ordinal, stream)


def on(place: Place | None) -> contextlib.AbstractContextManager:
    """Inside, this thread's launches are offered to the place, whose device is current; None leaves all as it is."""
    return contextlib.nullcontext() if place is None else _on(place)


@contextlib.contextmanager
def _on(place: Place) -> Iterator[None]:
    with cuda_driver.current(place.ordinal), placed(place):
        yield
