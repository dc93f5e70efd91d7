"""Masks that hide padding: where each sample's keys are a prefix of all keys, its length says the same, and kernels take it."""
from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.packing import Packing
from ..runtime.detect import runtime_of
from .read_once import read_once

HIDDEN = -9984.0
"""What is added to a score hides its key from here down: its exponential is 0 in float32. ppdiffusers adds -10000, which is
this in bfloat16."""


def prefix_lengths(mask: Any, batch: int, keys: int) -> tuple[int, ...] | None:
    """How many keys each sample attends to, where the mask shows every query the first ones of its sample and no others.

    mask: bool (True attends) or added to scores (0 attends, HIDDEN or less does not), [B or 1, M] or with dimensions of 1
        between, M = keys. Read once, as long as it lives and is not written to.
    returns: batch lengths, each at least 1; None for any other mask.
    """
    shape = list(mask.shape)
    if shape[-1] != keys or shape[0] not in (1, batch) or any(size != 1 for size in shape[1:-1]) or len(shape) < 2:
        return None
    lengths = read_once(mask, "prefix", lambda: _read(mask))
    return lengths if lengths is None or len(lengths) == batch else lengths * batch


def _read(mask: Any) -> tuple[int, ...] | None:
    values = runtime_of(mask).to_numpy(mask).reshape(mask.shape[0], -1)
    seen = values if values.dtype == np.bool_ else values == 0
    if values.dtype != np.bool_ and not (seen | (values <= HIDDEN)).all():
        return None
    lengths = seen.sum(1)
    whole = (seen == (np.arange(seen.shape[1]) < lengths[:, None])).all()
    return tuple(int(n) for n in lengths) if whole and lengths.min() > 0 else None


def packed(q: Any, k: Any, v: Any, lengths: tuple[int, ...]) -> tuple[Any, Any, Any, Packing]:
    """q, k, v [B, N, H, D] as packed sequences [tokens, H, D]: all queries of a sample, and its first `lengths` keys."""
    runtime = runtime_of(q)
    batch, tokens, _, _ = q.shape
    of_lengths = lambda x: runtime.concat([x[sample, :length] for sample, length in enumerate(lengths)], 0)
    beginnings = lambda sizes: runtime.from_numpy(np.cumsum([0, *sizes]).astype(np.int32), q, "int32")
    packing = Packing(beginnings([tokens] * batch), beginnings(lengths), tokens, max(lengths))
    return q.reshape([batch * tokens, *q.shape[2:]]), of_lengths(k), of_lengths(v), packing
