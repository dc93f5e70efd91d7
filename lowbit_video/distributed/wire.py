"""What a framework's collectives must do for us: `paddle_wire` and `torch_wire` do.

Everything travels as bytes. A framework's collectives know some dtypes on some devices and not others (no FP8 anywhere, sums of
float16 that overflow on CPUs); bytes always pass.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

TIMEOUT = "LOWBIT_VIDEO_TIMEOUT"
"""Environment variable: seconds for which a rank may keep another waiting; more than a step or a decoding takes."""
DEFAULT_TIMEOUT = 1800.0


def timeout() -> float:
    """Seconds for which a rank may keep another waiting: LOWBIT_VIDEO_TIMEOUT, else half an hour."""
    return float(os.environ.get(TIMEOUT, DEFAULT_TIMEOUT))


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """On a GPU the current stream waits for it, and the host goes on; on a CPU it is done when this returns."""


class Done:
    """A transfer that is finished."""

    def wait(self) -> None:
        pass


class Wire(Protocol):
    """This process and the others of a run. rank: this one's number; size: how many there are.

    All transfers are asynchronous on a GPU: they begin when the current stream gets there, and what they read must not be
    written, nor what they write be read, before `wait()`. The caller keeps the tensors alive until then.
    """

    rank: int
    size: int

    def exchange(self, sent: Any, sent_bytes: Sequence[int], received: Any, received_bytes: Sequence[int]) -> Work:
        """Everyone to everyone.

        sent, received: contiguous uint8 [bytes], one piece for each rank in turn. sent_bytes, received_bytes: [size], the
        pieces' lengths, 0 where nothing passes, as for the rank itself; who has nothing to pass takes part without waiting.
        """

    def send(self, tensor: Any, to: int) -> Work:
        """To one rank, who calls `receive`. tensor: contiguous, at the beginning of its own memory (no slice), of any dtype."""

    def receive(self, tensor: Any, source: int) -> Work:
        """From one rank, who calls `send`. tensor: as there; is overwritten."""

    def barrier(self) -> None:
        """Returns when every rank has called it; the host waits."""
