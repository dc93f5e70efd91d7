"""An error raised inside a Paddle operator, kept: the executor shows the caller a bare SystemError instead of it."""
from __future__ import annotations

_failure: list[BaseException] = []


def keep_failure(error: BaseException) -> None:
    """Keeps an error for `take_failure`."""
    _failure[:] = [error]


def take_failure() -> BaseException | None:
    """The last error raised inside an operator, once."""
    return _failure.pop() if _failure else None
