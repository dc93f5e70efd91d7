"""Statistics over tokens: the mean of K (or Q) and the absmax of V, per channel, in two deterministic passes.

First each program reduces a chunk of tokens to one row of float32 partials, then one small program per
(batch, head) folds the partials in a fixed order. No atomics, no zeroed counters, no full-size copy.
"""
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..buffers import as_buffer
from ..formats import MIN_MAGNITUDE, get_format
from ..launch import launch
from .shapes import STATS_CHUNK, ceil_div

MEAN, ABSMAX = tl.constexpr(0), tl.constexpr(1)
FP8_MAX = tl.constexpr(get_format("fp8").max_code)
TINY = tl.constexpr(MIN_MAGNITUDE)
STATS_TILE = 4096
"""Elements that one program of the first pass loads at once."""
STATS_WARPS = 4
FOLD = 32
"""Partials that the second pass reads at once."""


@triton.jit
def _chunk_stats(p_x, p_out, start, n, stride_n, D: tl.constexpr, PAD_D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
                 OP: tl.constexpr):
    o_d = tl.arange(0, PAD_D)
    b_acc = tl.zeros([TILE, PAD_D], tl.float32)
    for i_t in tl.static_range(CHUNK // TILE):
        o_n = tl.program_id(0) * CHUNK + i_t * TILE + tl.arange(0, TILE)
        m_x = (o_n < n)[:, None] & (o_d < D)[None, :]
        # [TILE, PAD_D]
        b_x = tl.load(p_x + (start + o_n).to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        if OP == MEAN:
            b_acc += b_x
        else:
            b_acc = tl.maximum(b_acc, tl.abs(b_x))
    if OP == MEAN:
        b_out = tl.sum(b_acc, 0)
    else:
        b_out = tl.max(b_acc, 0)
    tl.store(p_out + o_d, b_out, mask=o_d < D)


@triton.jit(do_not_specialize=["B", "H", "N"])
def token_stats_kernel(x, y, partial, cu_seqlens, x_stride_b, x_stride_h, x_stride_n, y_stride_b, y_stride_h, y_stride_n,
                       B, H, N, D: tl.constexpr, PAD_D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
                       OP: tl.constexpr, VARLEN: tl.constexpr):
    """Partials [B (or 2B), H, chunks, D] of x by OP; rows of the batch past B are y's, by ABSMAX."""
    i_c, i_h, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b = i_z % B
    start, n = 0, N
    if VARLEN:
        start = tl.load(cu_seqlens + i_b)
        n = tl.load(cu_seqlens + i_b + 1) - start
    p_out = partial + ((i_z * H + i_h).to(tl.int64) * tl.num_programs(0) + i_c) * D
    if i_z < B:
        p_x = x + i_b.to(tl.int64) * x_stride_b + i_h.to(tl.int64) * x_stride_h
        _chunk_stats(p_x, p_out, start, n, x_stride_n, D, PAD_D, CHUNK, TILE, OP)
    else:
        p_y = y + i_b.to(tl.int64) * y_stride_b + i_h.to(tl.int64) * y_stride_h
        _chunk_stats(p_y, p_out, start, n, y_stride_n, D, PAD_D, CHUNK, TILE, ABSMAX)


@triton.jit
def _fold(p_partial, chunks, D: tl.constexpr, PAD_D: tl.constexpr, FOLD: tl.constexpr, OP: tl.constexpr):
    o_d = tl.arange(0, PAD_D)
    b_acc = tl.zeros([FOLD, PAD_D], tl.float32)
    for i_c in range(0, chunks, FOLD):
        o_c = i_c + tl.arange(0, FOLD)
        m_c = (o_c < chunks)[:, None] & (o_d < D)[None, :]
        b_part = tl.load(p_partial + o_c.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_c, other=0.0)
        if OP == MEAN:
            b_acc += b_part
        else:
            b_acc = tl.maximum(b_acc, b_part)
    if OP == MEAN:
        b_out = tl.sum(b_acc, 0)
    else:
        b_out = tl.max(b_acc, 0)
    return b_out


@triton.jit(do_not_specialize=["B", "H", "N", "chunks"])
def fold_stats_kernel(partial, x_out, y_out, cu_seqlens, B, H, N, chunks,
                      D: tl.constexpr, PAD_D: tl.constexpr, FOLD: tl.constexpr, OP: tl.constexpr, VARLEN: tl.constexpr):
    """x_out [B, H, D] = mean (or absmax / 448) of the first B rows of partials, y_out the same of the others by ABSMAX."""
    i_h, i_z = tl.program_id(0), tl.program_id(1)
    i_b = i_z % B
    n = N
    if VARLEN:
        n = tl.load(cu_seqlens + i_b + 1) - tl.load(cu_seqlens + i_b)
    o_d = tl.arange(0, PAD_D)
    p_partial = partial + (i_z * H + i_h).to(tl.int64) * chunks * D
    o_out = (i_b * H + i_h) * D + o_d
    if i_z < B:
        b_out = _fold(p_partial, chunks, D, PAD_D, FOLD, OP)
        if OP == MEAN:
            b_out = b_out / tl.maximum(n, 1).to(tl.float32)
        else:
            b_out = tl.maximum(b_out, TINY) / FP8_MAX
        tl.store(x_out + o_out, b_out, mask=o_d < D)
    else:
        b_out = tl.maximum(_fold(p_partial, chunks, D, PAD_D, FOLD, ABSMAX), TINY) / FP8_MAX
        tl.store(y_out + o_out, b_out, mask=o_d < D)


def _launch_token_stats(x, x_strides, y, y_strides, partial, x_out, y_out, op, shape, cu_seqlens, max_len) -> None:
    batch, heads, tokens, head_dim = shape
    varlen = cu_seqlens is not None
    chunks = ceil_div(max_len if varlen else tokens, STATS_CHUNK)
    rows = batch if y is None else 2 * batch
    pad_d = triton.next_power_of_2(head_dim)
    x, y, partial, cu_seqlens = as_buffer(x), as_buffer(y), as_buffer(partial), as_buffer(cu_seqlens)
    x_strides = (0, *x_strides[1:]) if varlen else tuple(x_strides)
    y_strides = (0, 0, 0) if y is None else (0, *y_strides[1:]) if varlen else tuple(y_strides)
    launch(
        token_stats_kernel, (chunks, heads, rows),  # without a y its branch is compiled all the same: it needs a pointer
        x, x if y is None else y, partial, cu_seqlens, *x_strides, *y_strides, batch, heads, tokens,
        D=head_dim, PAD_D=pad_d, CHUNK=STATS_CHUNK, TILE=min(STATS_TILE // pad_d, STATS_CHUNK), OP=op, VARLEN=varlen,
        num_warps=STATS_WARPS)
    launch(
        fold_stats_kernel, (heads, rows),
        partial, as_buffer(x_out), as_buffer(x_out if y_out is None else y_out), cu_seqlens, batch, heads, tokens, chunks,
        D=head_dim, PAD_D=pad_d, FOLD=FOLD, OP=op, VARLEN=varlen, num_warps=4)


def launch_token_mean(x: Any, strides: tuple[int, int, int], partial: Any, mean: Any, *, shape: tuple[int, int, int, int],
                      cu_seqlens: Any = None, max_len: int | None = None) -> None:
    """mean [B, H, D] float32 of x over its tokens, accumulated in float32.

    x: [B, H, N, D] of `shape` by `strides` (batch, head, seq) in elements, last dim contiguous.
    partial: float32 scratch of `shapes.partial_shape`. With cu_seqlens int32 [S + 1] x is packed: shape
    (S, H, T, D), the batch stride is ignored, max_len is the longest sequence. An empty sequence has mean 0.
    """
    _launch_token_stats(x, strides, None, None, partial, mean, None, MEAN.value, shape, cu_seqlens, max_len)


def launch_v_scale(v: Any, strides: tuple[int, int, int], partial: Any, v_scale: Any, *, shape: tuple[int, int, int, int],
                   cu_seqlens: Any = None, max_len: int | None = None) -> None:
    """v_scale [B, H, D] float32 = max(absmax over tokens, 1e-30) / 448; arguments as `launch_token_mean`."""
    _launch_token_stats(v, strides, None, None, partial, v_scale, None, ABSMAX.value, shape, cu_seqlens, max_len)


def launch_kv_stats(k: Any, k_strides: tuple[int, int, int], v: Any, v_strides: tuple[int, int, int], partial: Any, mean: Any,
                    v_scale: Any, *, shape: tuple[int, int, int, int], cu_seqlens: Any = None,
                    max_len: int | None = None) -> None:
    """K's mean and V's scale in one launch of each pass; partial has twice the batch of `shapes.partial_shape`."""
    _launch_token_stats(k, k_strides, v, v_strides, partial, mean, v_scale, MEAN.value, shape, cu_seqlens, max_len)
