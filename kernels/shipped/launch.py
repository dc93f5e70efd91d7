"""The launch of a shipped kernel, the first time and again, by the CUDA driver and nothing else."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..driver_launch import DriverLaunch
from ..launch import record
from ..parameters import POINTER, SCALARS, Argument
from .choice import chosen
from .kinds import describe
from .store import Build, find, image


class Place:
    """A device, for `kernels.launch.placed`: launches that a shipped kernel does for are made there.

    driver: the module that speaks to CUDA's (`runtime.cuda_driver`). stream(): the raw handle of the framework's current
    stream. The device must be current where a launch is made.
    """

    def __init__(self, driver: Any, ordinal: int, stream: Callable[[], int]) -> None:
        self.driver, self.ordinal, self.stream = driver, ordinal, stream
        self._functions: dict[str, int] = {}
        self._loading = threading.Lock()

    def launch(self, kernel: Any, grid: Sequence[int], arguments: Sequence[Any], constants: Mapping[str, Any]) -> bool:
        """Launches and records it; False where no shipped kernel does for these arguments and Triton may compile one.

        Raises ValueError where Triton may not.
        """
        described = describe(kernel, arguments, constants)
        build = find(described)
        if build is None:
            if chosen().compiled:
                return False
            raise ValueError(f"no shipped kernel {described.name} is for ({', '.join(described.kinds)}) with "
                             f"{', '.join(described.constants)}, and Triton compiles none: {chosen().why}")
        one = DriverLaunch(build.function, self.function(build), (*grid, 1, 1)[:3], build.warps, build.shared,
                           tuple(arguments_of(build, described.values)))
        one.run(self.driver, self.stream())
        record(one)
        return True

    def function(self, build: Build) -> int:
        """The driver's handle of a build, loaded the first time."""
        with self._loading:
            if build.image not in self._functions:
                self._functions[build.image] = self.driver.load_function(image(build), build.function, build.shared,
                                                                         self.ordinal)
            return self._functions[build.image]


def arguments_of(build: Build, values: Sequence[Any]) -> Iterator[Argument]:
    """What a build is handed of a launch's values."""
    maps = iter(build.maps)
    for kind, value in zip(build.kinds, values):
        if kind.startswith("tma"):
            yield Argument(next(maps), value)
        elif kind.startswith("*"):
            yield Argument(POINTER, value)
        elif (number := kind.partition("/")[0]) in SCALARS:
            yield Argument(number, value)
