"""The launch of a shipped kernel, the first time and again, by the CUDA driver and nothing else."""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..launch import Replay, record
from .choice import chosen
from .kinds import describe
from .parameters import Parameters
from .store import Build, find, image

WARP = 32
"""Threads of a warp."""


class ShippedLaunch(NamedTuple):
    """A launch of a shipped kernel; function: the driver's handle of it, on the device where it was launched."""

    build: Build
    function: int
    grid: tuple[int, int, int]
    values: tuple[Any, ...]
    driver: Any

    def run(self, stream: int) -> None:
        """Launches it on the addresses that it was given."""
        parameters = Parameters(self.build, self.values, self.driver)
        for word, buffer in parameters.addresses:
            parameters.words[word] = buffer.data_ptr()
        for one, buffer in parameters.maps:
            one.encode(buffer.data_ptr())
        self._launcher(parameters)(stream)

    def replay(self, numbers: Mapping[str, int]) -> Replay | None:
        """What launches it again; None where an argument's memory has no known origin.

        numbers: the place of each origin's tensor among the addresses.
        """
        parameters = Parameters(self.build, self.values, self.driver)
        given = [*parameters.addresses, *parameters.maps]
        if any(buffer.origin is None or buffer.origin.tensor not in numbers for _, buffer in given):
            return None
        placed = lambda pairs: tuple((one, numbers[buffer.origin.tensor], buffer.origin.offset) for one, buffer in pairs)
        addresses, maps = placed(parameters.addresses), placed(parameters.maps)
        words, launch, mine = parameters.words, self._launcher(parameters), threading.Lock()

        def replay(stream: int, given: list[int]) -> None:
            with mine:  # the parameters are one memory, which the driver has copied when a launch returns
                for word, tensor, offset in addresses:
                    words[word] = given[tensor] + offset
                for one, tensor, offset in maps:
                    one.encode(given[tensor] + offset)
                launch(stream)

        return replay

    def _launcher(self, parameters: Parameters) -> Callable[[int], None]:
        return self.driver.kernel_launcher(self.function, self.grid, WARP * self.build.warps, self.build.shared,
                                           parameters.pointers)

    @staticmethod
    def watched() -> bool:
        """Whether a profiler wants to see launches; those that hook the driver see these anyway."""
        return False


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
        one = ShippedLaunch(build, self.function(build), (*grid, 1, 1)[:3], described.values, self.driver)
        one.run(self.stream())
        record(one)
        return True

    def function(self, build: Build) -> int:
        """The driver's handle of a build, loaded the first time."""
        with self._loading:
            if build.image not in self._functions:
                self._functions[build.image] = self.driver.load_function(image(build), build.function, build.shared,
                                                                         self.ordinal)
            return self._functions[build.image]
