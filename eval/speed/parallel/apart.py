"""Computation and exchange apart: calls whose ranks pass nothing on, and their transfers with nothing computed beside them."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lowbit_video.distributed.exchange import on_the_wire
from lowbit_video.distributed.wire import Done, Wire, Work
from lowbit_video.engine.codes import copy_parts
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.kernels.exchange.layout import Copy
from lowbit_video.runtime.detect import runtime_of

COMPUTED, EXCHANGED = " / computed", " / exchanged"
"""After a call's name: the call without its transfers, its transfers alone."""
CODES = "codes"
"""The name of what travels unless something else is asked for."""
WORD = 4
"""Bytes that are copied at once."""

Sizes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of a transfer: bytes to each rank, and from each."""


class TappedWire:
    """A wire that notes what passes, and can be silent.

    passed: the sizes of every transfer so far, in order. kept: what the first of each sizes brought; where the wire is silent,
    that is copied in place of a transfer, so that values stay of their kind (no scale is NaN, say).
    """

    def __init__(self, wire: Wire) -> None:
        self.wire, self.rank, self.size = wire, wire.rank, wire.size
        self.passed: list[Sizes] = []
        self.kept: dict[Sizes, Any] = {}
        self._silent = False

    @property
    def kept_gib(self) -> float:
        """What is kept takes on this rank's device, GiB."""
        return sum(sum(received_bytes) for _, received_bytes in self.kept) / 2**30

    def exchange(self, sent: Any, sent_bytes: Sequence[int], received: Any, received_bytes: Sequence[int]) -> Work:
        """See `Wire.exchange`."""
        sizes = tuple(sent_bytes), tuple(received_bytes)
        self.passed.append(sizes)
        if not self._silent:
            self.kept.setdefault(sizes, received)
            return self.wire.exchange(sent, sent_bytes, received, received_bytes)
        if count := sum(received_bytes) // WORD * WORD:
            copy_parts((self.kept[sizes],), received, [Copy(*[0] * 8, rows=1, count=count)], 1, 1, runtime_of(sent))
        return Done()

    def barrier(self) -> None:
        """See `Wire.barrier`."""
        self.wire.barrier()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, nothing passes."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False


def replay(wire: Wire, passed: Sequence[Sizes], like: Any) -> Callable[[], None]:
    """A call that does these transfers one after the other, of any bytes. like: a tensor on this rank's device."""
    runtime = runtime_of(like)
    memory = {size: runtime.empty((size,), "uint8", like) for size in {sum(sizes) for one in passed for sizes in one}}
    received = {size: runtime.empty((size,), "uint8", like) for size in {sum(sizes) for _, sizes in passed}}

    def call() -> None:
        for to, source in passed:
            wire.exchange(memory[sum(to)], to, received[sum(source)], source).wait()

    return call


def formats(precision: str) -> dict[str, tuple[str, str]]:
    """(exchange, output) by name, all that differ for attention of this precision; CODES: its own."""
    options = AttentionOptions(precision)
    found = {"16bit": ("16bit", "16bit")}
    if options.precision.exact:
        return found
    found[CODES] = ("auto", "16bit")
    for exchange in ("int8", "int4"):
        with contextlib.suppress(ValueError):  # no precision has K in that format
            if on_the_wire(options, exchange) != options:
                found[f"{exchange} codes"] = (exchange, "16bit")
    return {**found, "codes, int8 output": ("auto", "int8")}
