"""`ring()`: keys shared by a group. (A stand-in: everyone gathers all of q, k and v.)"""
from __future__ import annotations

from typing import Any

from ..runtime.detect import runtime_of
from .agree import values_of
from .group import Group


def ring(attend: Any, group: Group, exchange: str = "auto") -> Any:
    """Wraps an `Attend` of whole sequences so that it takes and gives this rank's tokens."""
    def wrapped(q, k, v, is_causal=False, scale=None, return_lse=False):
        runtime = runtime_of(q)
        rows = values_of(q.shape[1], group, q, runtime)
        whole = []
        for t in (q, k, v):
            parts = group.all_gather_rows(runtime.contiguous(t.moveaxis(1, 0)), rows, runtime, "attention in")
            whole.append(runtime.concat(parts, 0).moveaxis(0, 1))
        begin = sum(rows[:group.rank])
        out = attend(*whole, is_causal, scale, return_lse)
        cut = slice(begin, begin + rows[group.rank])
        return (out[0][:, cut], out[1][:, :, cut]) if return_lse else out[:, cut]

    return wrapped
