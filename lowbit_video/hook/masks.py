"""Masks that hide padding: where each sample's keys are a prefix of all keys, its length says the same, and kernels take it."""
from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from ..engine.packing import Packing
from ..runtime.detect import runtime_of

HIDDEN = -9984.0
"""What is added to a score hides its key from here down: its exponential is 0 in float32. ppdiffusers adds -10000, which is
this in bfloat16."""

_known: dict[int, tuple[Any, int, tuple[int, ...] | None]] = {}
"""id of a mask -> itself, weakly, its version, and its lengths: a model gives one mask to all its blocks, and to read it waits
for a GPU."""


def prefix_lengths(mask: Any, batch: int, keys: int) -> tuple[int, ...] | None:
    """How many keys each sample attends to, where the mask shows every query the first ones of its sample and no others.

    mask: bool (True attends) or added to scores (0 attends, HIDDEN or less does not), [B or 1, M] or with dimensions of 1
        between, M = keys. Read once, as long as it lives and is not written to.
    returns: batch lengths, each at least 1; None for any other mask.
    """
    shape = list(mask.shape)
    if shape[-1] != keys or shape[0] not in (1, batch) or any(size != 1 for size in shape[1:-1]) or len(shape) < 2:
        return None
    lengths = _read_once(mask)
    return lengths if lengths is None or len(lengths) == batch else lengths * batch


def _read_once(mask: Any) -> tuple[int, ...] | None:
    version, key = _version(mask), id(mask)
    reference, at, lengths = _known.get(key, (None, None, None))
    if version is None or reference is None or reference() is not mask or at != version:
        lengths = _read(mask)
        if version is not None:
            _known[key] = (weakref.ref(mask, lambda gone: _forget(key, gone)), version, lengths)
    return lengths


def _version(mask: Any) -> int | None:
    """How often the mask was written to; None where it does not tell (made under torch.inference_mode)."""
    if hasattr(mask, "inplace_version"):
        return mask.inplace_version
    return None if mask.is_inference() else mask._version


def _forget(key: int, gone: Any) -> None:
    if key in _known and _known[key][0] is gone:  # another mask may have that id by now
        del _known[key]


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
