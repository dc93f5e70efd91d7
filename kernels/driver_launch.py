"""A launch by the CUDA driver, the first time and again: only addresses and the stream change."""
from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .parameters import Argument, Parameters

WARP = 32
"""Threads of a warp."""

Replay = Callable[[int, list[int]], None]
"""`replay(stream, addresses)`: one launch again, on a raw stream, with other addresses for the tensors it was given."""


class DriverLaunch(NamedTuple):
    """What the driver needs to know of a launch.

    name: the kernel's. function: the driver's handle of it, on the device where it is launched. shared: bytes of dynamic shared
    memory. owner: what keeps the function loaded as long as it lives, if anything does.
    """

    name: str
    function: int
    grid: tuple[int, int, int]
    warps: int
    shared: int
    arguments: tuple[Argument, ...]
    owner: Any = None

    def run(self, driver: Any, stream: int) -> None:
        """Launches it on the addresses that it was given. driver: `runtime.cuda_driver`; the device must be current."""
        parameters = Parameters(self.arguments, driver)
        for word, buffer in parameters.addresses:
            parameters.words[word] = buffer.data_ptr()
        for one, buffer in parameters.maps:
            one.encode(buffer.data_ptr())
        self._launcher(parameters, driver)(stream)

    def replay(self, driver: Any, numbers: Mapping[str, int]) -> Replay | str:
        """What launches it again; where an argument's memory has no known origin, that in words.

        numbers: the place of each origin's tensor among the addresses.
        """
        parameters = Parameters(self.arguments, driver)
        given = [*parameters.addresses, *parameters.maps]
        if any(buffer.origin is None or buffer.origin.tensor not in numbers for _, buffer in given):
            return f"{self.name}: it reads or writes memory that is none of the call's tensors"
        placed = lambda pairs: tuple((one, numbers[buffer.origin.tensor], buffer.origin.offset) for one, buffer in pairs)
        addresses, maps = placed(parameters.addresses), placed(parameters.maps)
        words, launch, mine = parameters.words, self._launcher(parameters, driver), threading.Lock()

        def replay(stream: int, given: list[int]) -> None:
            with mine:  # the parameters are one memory, which the driver has copied when a launch returns
                for word, tensor, offset in addresses:
                    words[word] = given[tensor] + offset
                for one, tensor, offset in maps:
                    one.encode(given[tensor] + offset)
                launch(stream)

        replay.owner = self.owner  # lives as long as what launches its function
        return replay

    @staticmethod
    def watched() -> bool:
        """Whether a profiler wants to see launches; those that hook the driver see these anyway."""
        return False

    def _launcher(self, parameters: Parameters, driver: Any) -> Callable[[int], None]:
        return driver.kernel_launcher(self.function, self.grid, WARP * self.warps, self.shared, parameters.pointers)
