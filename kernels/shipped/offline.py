"""Triton with no GPU: a driver that only names the arch to compile for."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class OfflineDriver:
    """Just enough of a Triton driver to compile for `arch`."""

    def __init__(self, arch: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * arch[0] + arch[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches kernels by device: one for each arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextlib.contextmanager
def offline(arch: tuple[int, int]) -> Iterator[None]:
    """Inside, Triton compiles for `arch`."""
    before = driver._active
    driver.set_active(OfflineDriver(arch))
    try:
        yield
    finally:
        driver._active = before
