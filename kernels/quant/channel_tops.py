"""The mean of each channel over the tokens and its largest magnitude without that mean, in one reading of Q or K.

What rotation needs of all tokens before it quantises. Each program reduces a chunk of tokens to a row of sums, one of largest
and one of smallest values, then one small program per (batch, head) folds these in a fixed order.
"""
from __future__ import annotations

from ..buffers import Buffer
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand, Sequences
from .shapes import STATS_CHUNK, ceil_div
from .token_stats import FOLD, STATS_TILE, STATS_WARPS


@triton.jit(do_not_specialize=["H", "N"])
def channel_ranges_kernel(x, ranges, cu_seqlens, stride_b, stride_h, stride_n, H, N, D: tl.constexpr, CHUNK: tl.constexpr,
                          TILE: tl.constexpr, VARLEN: tl.constexpr):
    """The [3, D] of one chunk: sums, largest and smallest values; of no tokens 0, -inf and inf."""
    i_c, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, n = 0, N
    if VARLEN:
        start = tl.load(cu_seqlens + i_b)
        n = tl.load(cu_seqlens + i_b + 1) - start
    p_x = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    o_d = tl.arange(0, D)
    b_sum = tl.zeros([TILE, D], tl.float32)
    b_most = tl.full([TILE, D], float("-inf"), tl.float32)
    b_least = tl.full([TILE, D], float("inf"), tl.float32)
    for i_t in tl.static_range(CHUNK // TILE):
        o_n = i_c * CHUNK + i_t * TILE + tl.arange(0, TILE)
        m_n = (o_n < n)[:, None]
        # [TILE, D]
        b_x = tl.load(p_x + (start + o_n).to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m_n, other=0.0).to(tl.float32)
        b_sum += b_x
        b_most = tl.maximum(b_most, tl.where(m_n, b_x, float("-inf")))
        b_least = tl.minimum(b_least, tl.where(m_n, b_x, float("inf")))
    p_out = ranges + ((i_b * H + i_h).to(tl.int64) * tl.num_programs(0) + i_c) * 3 * D + o_d
    tl.store(p_out, tl.sum(b_sum, 0))
    tl.store(p_out + D, tl.max(b_most, 0))
    tl.store(p_out + 2 * D, tl.min(b_least, 0))


@triton.jit(do_not_specialize=["H", "N", "chunks"])
def fold_ranges_kernel(ranges, mean, top, cu_seqlens, H, N, chunks, D: tl.constexpr, FOLD: tl.constexpr, SMOOTH: tl.constexpr,
                       VARLEN: tl.constexpr):
    """mean [B, H, D] where SMOOTH, and top [B, H, D], from ranges [B, H, chunks, 3, D]."""
    i_h, i_b = tl.program_id(0), tl.program_id(1)
    n = N
    if VARLEN:
        n = tl.load(cu_seqlens + i_b + 1) - tl.load(cu_seqlens + i_b)
    p_ranges = ranges + (i_b * H + i_h).to(tl.int64) * chunks * 3 * D
    o_d = tl.arange(0, D)
    b_sum = tl.zeros([FOLD, D], tl.float32)
    b_most = tl.full([FOLD, D], float("-inf"), tl.float32)
    b_least = tl.full([FOLD, D], float("inf"), tl.float32)
    for i_c in range(0, chunks, FOLD):
        o_c = i_c + tl.arange(0, FOLD)
        m_c = (o_c < chunks)[:, None]
        p_c = p_ranges + o_c.to(tl.int64)[:, None] * 3 * D + o_d[None, :]
        b_sum += tl.load(p_c, mask=m_c, other=0.0)
        b_most = tl.maximum(b_most, tl.load(p_c + D, mask=m_c, other=float("-inf")))
        b_least = tl.minimum(b_least, tl.load(p_c + 2 * D, mask=m_c, other=float("inf")))
    p_row = (i_b * H + i_h).to(tl.int64) * D + o_d
    b_mean = tl.zeros([D], tl.float32)
    if SMOOTH:
        b_mean = tl.sum(b_sum, 0) / tl.maximum(n, 1).to(tl.float32)
        tl.store(mean + p_row, b_mean)
    b_top = tl.maximum(tl.max(b_most, 0) - b_mean, b_mean - tl.min(b_least, 0))
    tl.store(top + p_row, tl.where(n > 0, b_top, 0.0))


def launch_channel_tops(x: Operand, ranges: Buffer, top: Buffer, mean: Buffer | None = None,
                        sequences: Sequences | None = None) -> None:
    """top [B, H, D] and, where given, mean [B, H, D] of x over its tokens, float32; without mean, top is of x itself.

    ranges: float32 scratch, three times the elements of `shapes.partial_shape`. sequences: x's shape is (S, H, T, D).
    """
    batch, heads, tokens, head_dim = x.shape
    chunks, packed = ceil_div(sequences.longest if sequences else tokens, STATS_CHUNK), sequences is not None
    cu = sequences.cu if packed else None
    launch(channel_ranges_kernel, (chunks, heads, batch), x.buffer, ranges, cu, *x.strides, heads, tokens, D=head_dim,
           CHUNK=STATS_CHUNK, TILE=STATS_TILE // head_dim, VARLEN=packed, num_warps=STATS_WARPS)
    launch(fold_ranges_kernel, (heads, batch), ranges, mean, top, cu, heads, tokens, chunks, D=head_dim, FOLD=FOLD,
           SMOOTH=mean is not None, VARLEN=packed, num_warps=4)
