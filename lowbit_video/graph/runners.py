"""What runs when a graph reaches a module's attention: runners by the number that the graph's operator is given."""
from __future__ import annotations

import itertools
import weakref
from typing import Any

_numbers = itertools.count(1)
_runners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(runner: Any) -> int:
    """A number for something with a `run(q, k, v[, mask])` on eager [B, N, H, D] tensors; its owner keeps it alive."""
    number = next(_numbers)
    _runners[number] = runner
    return number


def runner_of(number: int) -> Any:
    """The runner of that number; RuntimeError where its owner is gone."""
    runner = _runners.get(number)
    if runner is None:
        raise RuntimeError("a compiled graph calls the attention of a model that is gone; compile the model that is in use")
    return runner
