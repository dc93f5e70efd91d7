"""Statistics over tokens: the means of K and Q and the absmax of V, per channel, in two deterministic passes.

First each program reduces a chunk of tokens to one row of float32 partials, then one small program per
(batch, head) folds the partials in a fixed order. No atomics, no zeroed counters, no full-size copy. Both passes
take all that a call needs at once: Q first, whose codes are made last, then K and V, which the next kernels still
find in the L2 cache.
"""
from __future__ import annotations

from ..buffers import Buffer
from ..formats import MIN_MAGNITUDE, get_format
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand, Packed
from .shapes import STATS_CHUNK, ceil_div

FP8_MAX = tl.constexpr(get_format("fp8").max_code)
TINY = tl.constexpr(MIN_MAGNITUDE)
STATS_TILE = 4096
"""Elements that one program of the first pass loads at once."""
STATS_WARPS = 4
FOLD = 32
"""Partials that the second pass reads at once."""


@triton.jit
def _chunk_stats(p_x, p_out, cu_seqlens, i_row, H, N, i_c, stride_b, stride_h, stride_n, D: tl.constexpr, PAD_D: tl.constexpr,
                 CHUNK: tl.constexpr, TILE: tl.constexpr, ABSMAX: tl.constexpr, VARLEN: tl.constexpr):
    """One row of partials [D]: the sum (or absmax) of chunk i_c of (batch, head) i_row."""
    i_b, i_h = i_row // H, i_row % H
    start, n = 0, N
    if VARLEN:
        start = tl.load(cu_seqlens + i_b)
        n = tl.load(cu_seqlens + i_b + 1) - start
    p_x += i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    o_d = tl.arange(0, PAD_D)
    b_acc = tl.zeros([TILE, PAD_D], tl.float32)
    for i_t in tl.static_range(CHUNK // TILE):
        o_n = i_c * CHUNK + i_t * TILE + tl.arange(0, TILE)
        m_x = (o_n < n)[:, None] & (o_d < D)[None, :]
        # [TILE, PAD_D]
        b_x = tl.load(p_x + (start + o_n).to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        if ABSMAX:
            b_acc = tl.maximum(b_acc, tl.abs(b_x))
        else:
            b_acc += b_x
    if ABSMAX:
        b_out = tl.max(b_acc, 0)
    else:
        b_out = tl.sum(b_acc, 0)
    tl.store(p_out + o_d, b_out, mask=o_d < D)


@triton.jit(do_not_specialize=["q_programs", "k_programs", "Hq", "Hk", "Nq", "Nk", "q_chunks", "k_chunks"])
def token_stats_kernel(q, k, v, partial, cu_q, cu_k, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
                       v_stride_b, v_stride_h, v_stride_n, q_programs, k_programs, Hq, Hk, Nq, Nk, q_chunks, k_chunks,
                       D: tl.constexpr, PAD_D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
                       WITH_Q: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr, VARLEN: tl.constexpr):
    """Partials of Q [B, Hq, q_chunks, D], then of K and of V [B, Hk, k_chunks, D]; program i writes row i of them all."""
    i_p = tl.program_id(0)
    p_out = partial + i_p.to(tl.int64) * D
    if WITH_Q:
        if i_p < q_programs:
            _chunk_stats(q, p_out, cu_q, i_p // q_chunks, Hq, Nq, i_p % q_chunks, q_stride_b, q_stride_h, q_stride_n, D, PAD_D,
                         CHUNK, TILE, False, VARLEN)
        i_p -= q_programs
    if WITH_K:
        if (i_p >= 0) & (i_p < k_programs):
            _chunk_stats(k, p_out, cu_k, i_p // k_chunks, Hk, Nk, i_p % k_chunks, k_stride_b, k_stride_h, k_stride_n, D, PAD_D,
                         CHUNK, TILE, False, VARLEN)
        i_p -= k_programs
    if WITH_V:
        if i_p >= 0:
            _chunk_stats(v, p_out, cu_k, i_p // k_chunks, Hk, Nk, i_p % k_chunks, v_stride_b, v_stride_h, v_stride_n, D, PAD_D,
                         CHUNK, TILE, True, VARLEN)


@triton.jit
def _fold(p_partial, p_out, cu_seqlens, i_row, H, N, chunks, D: tl.constexpr, PAD_D: tl.constexpr, FOLD: tl.constexpr,
          ABSMAX: tl.constexpr, VARLEN: tl.constexpr):
    """Row i_row of p_out [rows, D] from partials [rows, chunks, D]."""
    p_partial += i_row.to(tl.int64) * chunks * D
    o_d = tl.arange(0, PAD_D)
    b_acc = tl.zeros([FOLD, PAD_D], tl.float32)
    for i_c in range(0, chunks, FOLD):
        o_c = i_c + tl.arange(0, FOLD)
        m_c = (o_c < chunks)[:, None] & (o_d < D)[None, :]
        b_part = tl.load(p_partial + o_c.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_c, other=0.0)
        if ABSMAX:
            b_acc = tl.maximum(b_acc, b_part)
        else:
            b_acc += b_part
    if ABSMAX:
        b_out = tl.maximum(tl.max(b_acc, 0), TINY) / FP8_MAX
    else:
        n = N
        if VARLEN:
            i_b = i_row // H
            n = tl.load(cu_seqlens + i_b + 1) - tl.load(cu_seqlens + i_b)
        b_out = tl.sum(b_acc, 0) / tl.maximum(n, 1).to(tl.float32)
    tl.store(p_out + i_row.to(tl.int64) * D + o_d, b_out, mask=o_d < D)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "Hq", "Hk", "Nq", "Nk", "q_chunks", "k_chunks"])
def fold_stats_kernel(partial, q_mean, k_mean, v_scale, cu_q, cu_k, q_rows, k_rows, Hq, Hk, Nq, Nk, q_chunks, k_chunks,
                      D: tl.constexpr, PAD_D: tl.constexpr, FOLD: tl.constexpr, WITH_Q: tl.constexpr, WITH_K: tl.constexpr,
                      WITH_V: tl.constexpr, VARLEN: tl.constexpr):
    """q_mean [B, Hq, D], k_mean [B, Hk, D] and v_scale [B, Hk, D] = absmax / 448, one program for each row of theirs."""
    i_p = tl.program_id(0)
    if WITH_Q:
        if i_p < q_rows:
            _fold(partial, q_mean, cu_q, i_p, Hq, Nq, q_chunks, D, PAD_D, FOLD, False, VARLEN)
        i_p -= q_rows
        partial += q_rows.to(tl.int64) * q_chunks * D
    if WITH_K:
        if (i_p >= 0) & (i_p < k_rows):
            _fold(partial, k_mean, cu_k, i_p, Hk, Nk, k_chunks, D, PAD_D, FOLD, False, VARLEN)
        i_p -= k_rows
        partial += k_rows.to(tl.int64) * k_chunks * D
    if WITH_V:
        if i_p >= 0:
            _fold(partial, v_scale, cu_k, i_p, Hk, Nk, k_chunks, D, PAD_D, FOLD, True, VARLEN)


def launch_stats(partial: Buffer, *, q: Operand | None = None, q_mean: Buffer | None = None, k: Operand | None = None,
                 k_mean: Buffer | None = None, v: Operand | None = None, v_scale: Buffer | None = None,
                 packed: Packed | None = None) -> None:
    """Any of q_mean [B, Hq, D], k_mean [B, Hkv, D] and v_scale [B, Hkv, D] (float32) in one launch of each pass.

    Means are accumulated in float32; v_scale = max(absmax over tokens, 1e-30) / 448. What is None is left out.
    partial: float32 scratch, as many elements as `shapes.partial_shape` of each given operand together. packed: of operands of
    shape (S, H, T, D). An empty sequence has mean 0.
    """
    given = [x for x in (q, k, v) if x is not None]
    kv = k or v
    batch, _, _, head_dim = given[0].shape
    q_heads, q_len = q.shape[1:3] if q else (1, 1)
    kv_heads, kv_len = kv.shape[1:3] if kv else (0, 1)
    q_chunks = ceil_div(packed.q.longest if packed and q else q_len, STATS_CHUNK)
    k_chunks = ceil_div(packed.k.longest if packed and kv else kv_len, STATS_CHUNK)
    q_rows, k_rows = (batch * q_heads if q else 0), batch * kv_heads
    kv_count = (k is not None) + (v is not None)
    pad_d = triton.next_power_of_2(head_dim)
    flags = dict(WITH_Q=q is not None, WITH_K=k is not None, WITH_V=v is not None, VARLEN=packed is not None)
    cu_q, cu_k = (packed.q.cu, packed.k.cu) if packed else (None, None)
    strides = [stride for x in (q, k, v) for stride in (x.strides if x else (0, 0, 0))]
    launch(
        token_stats_kernel, (q_rows * q_chunks + kv_count * k_rows * k_chunks,),
        *[(x or given[0]).buffer for x in (q, k, v)],  # one that is left out is never read
        partial, cu_q, cu_k, *strides, q_rows * q_chunks, k_rows * k_chunks, q_heads, kv_heads, q_len, kv_len, q_chunks,
        k_chunks, D=head_dim, PAD_D=pad_d, CHUNK=STATS_CHUNK, TILE=min(STATS_TILE // pad_d, STATS_CHUNK), **flags,
        num_warps=STATS_WARPS)
    launch(
        fold_stats_kernel, (q_rows + kv_count * k_rows,), partial, q_mean, k_mean, v_scale, cu_q, cu_k, q_rows, k_rows, q_heads,
        kv_heads, q_len, kv_len, q_chunks, k_chunks, D=head_dim, PAD_D=pad_d, FOLD=FOLD, **flags, num_warps=4)
