"""Where attention of codes writes its output: any tensor, by strides."""
from __future__ import annotations

from typing import Any, NamedTuple

from ..runtime.protocol import Runtime


class Target(NamedTuple):
    """tensor: contiguous. begin: byte of the first element in it. strides: elements from one (outer, inner, token) to the next,
    outer and inner as in `Layout.order`; the head dim is contiguous."""

    tensor: Any
    begin: int
    strides: tuple[int, int, int]


def new_target(shape: tuple[int, int, int, int], dtype: str, tokens_first: bool, like: Any, runtime: Runtime) -> Target:
    """A new tensor for (outer, inner, tokens, head dim): [N, outer, inner, D] (tokens_first) or [outer, N, inner, D]."""
    outer, inner, tokens, head_dim = shape
    row = inner * head_dim
    if tokens_first:
        return Target(runtime.empty((tokens, outer, inner, head_dim), dtype, like), 0, (row, head_dim, outer * row))
    return Target(runtime.empty((outer, tokens, inner, head_dim), dtype, like), 0, (tokens * row, head_dim, row))
