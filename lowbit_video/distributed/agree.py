"""What all ranks of a group must hold alike: the first one's tensor, everyone's small values."""
from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..runtime.protocol import Runtime
from .group import Group, as_bytes

PURPOSE = "agreement"
"""What these bytes are counted as."""


def from_first(tensor: Any, group: Group, runtime: Runtime, purpose: str = PURPOSE) -> Any:
    """The tensor of the group's first rank, on every rank. tensor: of one shape and dtype everywhere."""
    if group.size == 1:
        return tensor
    others = group.size - 1
    flat = as_bytes(runtime.contiguous(tensor), runtime)
    size = runtime.shape(flat)[0]
    if group.rank == 0:  # a byte comes back from each, as collectives want no empty tensors
        received = runtime.empty((others,), "uint8", tensor)
        sent = runtime.concat([flat] * others, 0)
        group.exchange(sent, [0] + [size] * others, received, [0] + [1] * others, purpose).wait()
        return tensor
    received = runtime.empty((size,), "uint8", tensor)
    group.exchange(runtime.contiguous(flat[:1]), [1] + [0] * others, received, [size] + [0] * others, purpose).wait()
    return runtime.view(received, runtime.dtype_name(tensor)).reshape(list(runtime.shape(tensor)))


def values_of(value: Any, group: Group, like: Any, runtime: Runtime) -> list[Any]:
    """Everyone's value, by place; the host waits.

    value: what JSON can hold, and NumPy's numbers. like: a tensor on the device that exchanges.
    """
    if group.size == 1:
        return [value]
    text = np.frombuffer(json.dumps(value, default=lambda number: number.item()).encode(), np.uint8)
    length = np.array([len(text)], np.int32).view(np.uint8)
    # to_numpy, not the tensors' own values: the host has to wait for them
    lengths = [int(runtime.to_numpy(part).view(np.int32)[0])
               for part in group.all_gather(runtime.from_numpy(length, like, "uint8"), runtime, PURPOSE)]
    mine = runtime.from_numpy(np.array(text), like, "uint8")
    parts = group.all_gather_rows(mine, lengths, runtime, PURPOSE)
    return [json.loads(runtime.to_numpy(part).tobytes()) for part in parts]
