"""One call at a time: what it keeps on a pipeline and its scheduler (timesteps, guidance, the interrupt flag) is its own."""
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from lowbit_video.errors import UnsupportedError

_turns: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_making = threading.Lock()
_mine = threading.local()


@contextlib.contextmanager
def alone(*objects: Any) -> Iterator[None]:
    """Waits until no other thread is in such a block with any of the objects, and keeps others waiting.

    Raises:
        UnsupportedError: this thread itself is in one; waiting would never end.
    """
    objects = tuple(one for one in objects if hasattr(type(one), "__weakref__") and type(one).__hash__)  # else no part of ours
    held = _mine.__dict__.setdefault("held", [])
    busy = [type(one).__name__ for one in objects if any(one is other for other in held)]
    if busy:
        raise UnsupportedError(
            f"{' and '.join(busy)} is in the middle of a call, and this call comes from within it (a callback?); supported is "
            "one call at a time: make this one afterwards, or on another pipeline with a scheduler of its own")
    with _making:
        turns = [_turns.setdefault(one, threading.Lock()) for one in sorted(objects, key=id)]  # one order: no deadlock
    with contextlib.ExitStack() as stack:
        for turn in turns:
            stack.enter_context(turn)
        held.extend(objects)
        try:
            yield
        finally:
            del held[-len(objects):]


def one_at_a_time(call: Callable) -> Callable:
    """A pipeline's call that waits for calls of other threads on the same pipeline, or on one that shares its scheduler."""

    @functools.wraps(call)
    def waiting(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        with alone(pipe, pipe.scheduler):
            return call(pipe, *args, **kwargs)

    return waiting
