"""What Triton needs to launch on Paddle's tensors: a driver that does without PyTorch.

Triton asks its active driver for the device, its capability and the stream; its own driver asks
PyTorch. Ours answers for Paddle and is active only around a launch, so that Paddle and PyTorch
(whose code may launch Triton kernels too) live in one process.
"""
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

from . import cuda_driver

_LAUNCH = threading.RLock()
"""Triton's active driver is one per process: a launch holds this while the driver is ours."""


@functools.cache
def _driver_class() -> type:
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class DeviceDriver(CudaDriver):
        """Triton's CUDA driver for one device; device, capability and stream come from the caller."""

        launcher_cls = CudaLauncher

        def __init__(self, ordinal: int, stream: Callable[[], int]) -> None:  # not super().__init__(): that imports PyTorch
            self.ordinal = ordinal
            self.get_current_device = lambda: ordinal
            self.get_current_stream = lambda _device=None: stream()
            self.get_device_capability = lambda device=None: cuda_driver.capability(ordinal if device is None else device)
            self.set_current_device = lambda _device: None

        @functools.cached_property
        def utils(self) -> object:  # compiles a small C file the first time
            return CudaUtils()

    return DeviceDriver


def device_driver(ordinal: int, stream: Callable[[], int]) -> object:
    """A Triton driver for the CUDA device `ordinal`; `stream()` returns the raw handle of the stream to launch on."""
    return _driver_class()(ordinal, stream)


@contextlib.contextmanager
def active(driver: object) -> Iterator[None]:
    """Makes a `device_driver` Triton's active one, and its device current; both are put back afterwards."""
    from triton.runtime.driver import driver as config

    with _LAUNCH:
        before = config._active  # reading `config.active` would create Triton's default driver, which needs PyTorch
        with cuda_driver.current(driver.ordinal):
            config.set_active(driver)
            try:
                yield
            finally:
                config.set_active(before)


def default() -> contextlib.AbstractContextManager:
    """A launch through Triton's own driver: waits while another thread launches through ours."""
    return _LAUNCH
