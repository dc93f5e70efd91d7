"""What runs when a graph reaches a module's attention: runners by the key that the graph's operator holds."""
from __future__ import annotations

import itertools
import weakref
from typing import Any

_keys = itertools.count(1)
_runners: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(runner: Any) -> str:
    """A key for something with a `run(q, k, v[, mask])` on eager [B, N, H, D] tensors; its owner keeps it alive."""
    key = f"attention_{next(_keys)}"  # a string: SOT makes a tensor of an integer that it sees vary
    _runners[key] = runner
    return key


def runner_of(key: str) -> Any:
    """The runner of that key; RuntimeError where its owner is gone."""
    runner = _runners.get(key)
    if runner is None:
        raise RuntimeError("a compiled graph calls the attention of a model that is gone; compile the model that is in use")
    return runner
