"""The statistics of a call that rotates, in two deterministic passes as `token_stats` has them.

Of each channel of Q and K the mean over the tokens and the largest magnitude without it, of V the scale. First each program
reduces a chunk of tokens to a row of sums, one of largest and one of smallest values, then one small program per (batch, head)
folds these in a fixed order. Q first, then K and V, which the next kernels still find in the L2 cache.
"""
from __future__ import annotations

from ..buffers import Buffer
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand, Packed
from .shapes import STATS_CHUNK, ceil_div
from .token_stats import FOLD, FP8_MAX, STATS_TILE, STATS_WARPS, TINY


@triton.jit
def _chunk_ranges(p_x, p_out, cu_seqlens, i_row, H, N, i_c, stride_b, stride_h, stride_n, D: tl.constexpr, CHUNK: tl.constexpr,
                  TILE: tl.constexpr, VARLEN: tl.constexpr):
    """The [3, D] of chunk i_c of (batch, head) i_row: sums, largest and smallest values; of no tokens 0, -inf and inf."""
    i_b, i_h = i_row // H, i_row % H
    start, n = 0, N
    if VARLEN:
        start = tl.load(cu_seqlens + i_b)
        n = tl.load(cu_seqlens + i_b + 1) - start
    p_x += i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
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
    tl.store(p_out + o_d, tl.sum(b_sum, 0))
    tl.store(p_out + D + o_d, tl.max(b_most, 0))
    tl.store(p_out + 2 * D + o_d, tl.min(b_least, 0))


@triton.jit(do_not_specialize=["q_programs", "k_programs", "Hq", "Hk", "Nq", "Nk", "q_chunks", "k_chunks"])
def channel_ranges_kernel(q, k, v, ranges, cu_q, cu_k, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
                          v_stride_b, v_stride_h, v_stride_n, q_programs, k_programs, Hq, Hk, Nq, Nk, q_chunks, k_chunks,
                          D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, VARLEN: tl.constexpr):
    """Ranges of Q [B, Hq, q_chunks, 3, D], then of K and, if the grid has them, of V [B, Hk, k_chunks, 3, D]."""
    i_p = tl.program_id(0)
    p_out = ranges + i_p.to(tl.int64) * 3 * D
    if i_p < q_programs:
        _chunk_ranges(q, p_out, cu_q, i_p // q_chunks, Hq, Nq, i_p % q_chunks, q_stride_b, q_stride_h, q_stride_n, D, CHUNK,
                      TILE, VARLEN)
    elif i_p < q_programs + k_programs:
        i_p -= q_programs
        _chunk_ranges(k, p_out, cu_k, i_p // k_chunks, Hk, Nk, i_p % k_chunks, k_stride_b, k_stride_h, k_stride_n, D, CHUNK,
                      TILE, VARLEN)
    else:
        i_p -= q_programs + k_programs
        _chunk_ranges(v, p_out, cu_k, i_p // k_chunks, Hk, Nk, i_p % k_chunks, v_stride_b, v_stride_h, v_stride_n, D, CHUNK,
                      TILE, VARLEN)


@triton.jit
def _fold(p_ranges, p_mean, p_top, cu_seqlens, i_row, H, N, chunks, D: tl.constexpr, FOLD: tl.constexpr, SMOOTH: tl.constexpr,
          SCALE: tl.constexpr, VARLEN: tl.constexpr):
    """Row i_row of top [rows, D], and of mean where SMOOTH, from ranges [rows, chunks, 3, D]; for SCALE top / 448."""
    n = N
    if VARLEN:
        i_b = i_row // H
        n = tl.load(cu_seqlens + i_b + 1) - tl.load(cu_seqlens + i_b)
    p_ranges += i_row.to(tl.int64) * chunks * 3 * D
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
    p_row = i_row.to(tl.int64) * D + o_d
    b_mean = tl.zeros([D], tl.float32)
    if SMOOTH:
        b_mean = tl.sum(b_sum, 0) / tl.maximum(n, 1).to(tl.float32)
        tl.store(p_mean + p_row, b_mean)
    b_top = tl.where(n > 0, tl.maximum(tl.max(b_most, 0) - b_mean, b_mean - tl.min(b_least, 0)), 0.0)
    if SCALE:
        b_top = tl.maximum(b_top, TINY) / FP8_MAX
    tl.store(p_top + p_row, b_top)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "Hq", "Hk", "Nq", "Nk", "q_chunks", "k_chunks"])
def fold_ranges_kernel(ranges, q_mean, k_mean, q_top, k_top, v_scale, cu_q, cu_k, q_rows, k_rows, Hq, Hk, Nq, Nk, q_chunks,
                       k_chunks, D: tl.constexpr, FOLD: tl.constexpr, SMOOTH_Q: tl.constexpr, SMOOTH_K: tl.constexpr,
                       VARLEN: tl.constexpr):
    """q_top [B, Hq, D], k_top and, if the grid has it, v_scale [B, Hk, D], with the means asked for; one program a row."""
    i_p = tl.program_id(0)
    p_keys = ranges + q_rows.to(tl.int64) * q_chunks * 3 * D
    if i_p < q_rows:
        _fold(ranges, q_mean, q_top, cu_q, i_p, Hq, Nq, q_chunks, D, FOLD, SMOOTH_Q, False, VARLEN)
    elif i_p < q_rows + k_rows:
        _fold(p_keys, k_mean, k_top, cu_k, i_p - q_rows, Hk, Nk, k_chunks, D, FOLD, SMOOTH_K, False, VARLEN)
    else:
        p_values = p_keys + k_rows.to(tl.int64) * k_chunks * 3 * D
        _fold(p_values, v_scale, v_scale, cu_k, i_p - q_rows - k_rows, Hk, Nk, k_chunks, D, FOLD, False, True, VARLEN)


def launch_channel_tops(ranges: Buffer, q: Operand, k: Operand, *, q_top: Buffer, k_top: Buffer, q_mean: Buffer | None = None,
                        k_mean: Buffer | None = None, v: Operand | None = None, v_scale: Buffer | None = None,
                        packed: Packed | None = None) -> None:
    """q_top [B, Hq, D] and k_top [B, Hkv, D], and the means and v_scale [B, Hkv, D] that are given, float32.

    A top is the largest magnitude of x without its mean, or of x itself where no mean is given; v_scale is as `launch_stats`'.
    ranges: float32 scratch, three times the elements of `shapes.partial_shape` of each given operand together. packed: of
    operands of shape (S, H, T, D). An empty sequence has mean and tops 0.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    q_chunks = ceil_div(packed.q.longest if packed else q_len, STATS_CHUNK)
    k_chunks = ceil_div(packed.k.longest if packed else kv_len, STATS_CHUNK)
    q_rows, k_rows, kv_count = batch * q_heads, batch * kv_heads, 1 if v is None else 2
    cu_q, cu_k = (packed.q.cu, packed.k.cu) if packed else (None, None)
    values, scale = v or k, v_scale or k_top  # what is left out is neither read nor written
    launch(
        channel_ranges_kernel, (q_rows * q_chunks + kv_count * k_rows * k_chunks,), q.buffer, k.buffer, values.buffer, ranges,
        cu_q, cu_k, *q.strides, *k.strides, *values.strides, q_rows * q_chunks, k_rows * k_chunks, q_heads, kv_heads, q_len,
        kv_len, q_chunks, k_chunks, D=head_dim, CHUNK=STATS_CHUNK, TILE=STATS_TILE // head_dim, VARLEN=packed is not None,
        num_warps=STATS_WARPS)
    launch(
        fold_ranges_kernel, (q_rows + kv_count * k_rows,), ranges, q_mean, k_mean, q_top, k_top, scale, cu_q, cu_k, q_rows,
        k_rows, q_heads, kv_heads, q_len, kv_len, q_chunks, k_chunks, D=head_dim, FOLD=FOLD, SMOOTH_Q=q_mean is not None,
        SMOOTH_K=k_mean is not None, VARLEN=packed is not None, num_warps=4)
