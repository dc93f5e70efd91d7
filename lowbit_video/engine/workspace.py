"""The workspace of a GPU call: all that it needs beside its output, in one allocation.

Codes, scales, means and the corrections of smoothing; where each begins depends on shapes alone, and is cached.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

from lowbit_video.kernels.buffers import Buffer, DType, Origin
from lowbit_video.kernels.formats import get_format, scale_block
from lowbit_video.kernels.pooled.tiles import KEY_TILE, query_tile
from lowbit_video.kernels.prologue.steps import partial_count
from lowbit_video.kernels.quant.shapes import ceil_div, code_shape, partial_shape, scale_shape, v_code_shape

from ..precision import Precision

ALIGNMENT = 256
"""Bytes between the beginnings of the workspace's parts; TMA needs 16, whole cache lines are faster."""


@dataclass(frozen=True)
class Workspace:
    """Where the parts of a call's workspace begin: parts[name] = (byte offset, dtype name, shape); bytes in all."""

    parts: dict[str, tuple[int, str, tuple[int, ...]]]
    size: int

    def buffers(self, address: int) -> dict[str, Buffer]:
        return {name: Buffer(address + offset, dtype, Origin("workspace", offset))
                for name, (offset, dtype, _) in self.parts.items()}


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


@functools.lru_cache(maxsize=1024)
def layout_workspace(q_shape: tuple[int, int, int, int], kv_shape: tuple[int, int, int, int], precision: Precision, lse: bool,
                     varlen: bool = False, max_q: int | None = None, max_k: int | None = None, pooled: str | None = None,
                     fused: bool = False) -> Workspace:
    """The workspace of low-bit attention over q [B, Hq, Nq, D] and k, v [B, Hkv, Nkv, D] (varlen: [S, H, T, D]).

    pooled: the tensors' dtype, where some keys are pooled. fused: statistics are those of `kernels.prologue`.
    """
    batch, q_heads, q_len, head_dim = q_shape
    kv_heads, kv_len = kv_shape[1], kv_shape[2]
    rows = () if varlen else (batch,)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "q_codes": (get_format(precision.q).storage, code_shape(q_shape, precision.q, varlen)),
        "k_codes": (get_format(precision.k).storage, code_shape(kv_shape, precision.k, varlen)),
        "q_scale": ("float32", scale_shape(q_shape, None, varlen)),
        "k_scale": ("float32", scale_shape(kv_shape, scale_block("k", precision.granularity), varlen)),
    }
    scratch = 0
    if precision.pv == "fp8":
        wanted["v_codes"] = ("float8_e4m3fn", v_code_shape(kv_shape, varlen))
        wanted["v_scale"] = ("float32", (batch, kv_heads, head_dim))
        scratch += 0 if pooled else _elements(partial_shape(kv_shape, max_k))
    if precision.smooth_k:
        wanted["k_mean"] = ("float32", (batch, kv_heads, head_dim))
        scratch += 0 if pooled else _elements(partial_shape(kv_shape, max_k))
        if lse:
            wanted["lse_shift"] = ("float32", (*rows, q_heads, q_len))
    if precision.smooth_q:
        wanted["q_mean"] = ("float32", (batch, q_heads, head_dim))
        wanted["bias"] = ("float32", (*rows, q_heads, kv_len))
        scratch += _elements(partial_shape(q_shape, max_q))
    if precision.rotate:
        wanted["q_top"] = ("float32", (batch, q_heads, head_dim))
        wanted["k_top"] = ("float32", (batch, kv_heads, head_dim))
        keys = 1 + (precision.pv == "fp8")  # and values
        rows_of_ranges = _elements(partial_shape(q_shape, max_q)) + keys * _elements(partial_shape(kv_shape, max_k))
        wanted["ranges"], scratch = ("float32", (3 * rows_of_ranges,)), 0
    if fused:
        scratch = (precision.smooth_q + precision.smooth_k + (precision.pv == "fp8")) * partial_count(kv_shape)
    if scratch:
        wanted["partial"] = ("float32", (scratch,))
    if pooled:
        wanted.update(_pooled_parts(q_shape, kv_shape, precision, pooled))
    parts, size = {}, 0
    for name, (dtype, shape) in wanted.items():
        parts[name] = (size, dtype, shape)
        size += -(-_elements(shape) * DType(dtype).itemsize // ALIGNMENT) * ALIGNMENT
    return Workspace(parts, max(size, ALIGNMENT))


def _pooled_parts(q_shape: tuple[int, int, int, int], kv_shape: tuple[int, int, int, int], precision: Precision, dtype: str
                  ) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What pooled attention needs beside: means and spreads of tiles, scores, lists, and the pooled keys' log-sum-exp."""
    batch, heads, q_len, head_dim = q_shape
    key_tiles = (*kv_shape[:2], ceil_div(kv_shape[2], KEY_TILE))
    query_tiles = (batch, heads, ceil_div(q_len, query_tile(head_dim)))
    pairs = (*query_tiles, key_tiles[2])
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "key_means": ("float32", (*key_tiles, head_dim)), "pooled_keys": (dtype, (*key_tiles, head_dim)),
        "key_spreads": ("float32", (*key_tiles, head_dim)), "pooled_values": (dtype, (*key_tiles, head_dim)),
        "value_spreads": ("float32", key_tiles), "query_means": ("float32", (*query_tiles, head_dim)),
        "query_squares": ("float32", (*query_tiles, head_dim)), "scores": ("float32", pairs), "listed": ("int32", pairs),
        "listed_count": ("int32", query_tiles), "pooled_lse": ("float32", (batch, heads, q_len))}
    if precision.pv == "fp8":
        parts["value_absmax"] = ("float32", (*key_tiles, head_dim))
    if precision.granularity == "block":
        parts["listed_scale"] = ("float32", pairs)
    return parts
