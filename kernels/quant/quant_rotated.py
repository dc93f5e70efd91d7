"""Q or K to codes as `quant_qk` makes them, its channels evened out and rotated on the way: still one pass over the input.

After the mean a channel is multiplied by the factor that makes it as large in Q as in K, then every row goes through the
orthonormal Hadamard matrix on the tensor cores: as two products in float16, of a row's leading bits and of those behind them.
Three in TF32 spill, and need more shared memory than there is; sums and differences by shuffles take twice the instructions.
"""
from __future__ import annotations

from typing import NamedTuple

from ..buffers import Buffer
from ..formats import ROTATED, get_format
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand, Sequences
from .quant_qk import TOKEN_ROWS
from .shapes import ceil_div, row_strides, scale_count
from .write_codes import TINY, write_codes


class Tops(NamedTuple):
    """The largest magnitude of each channel of Q [B, Hq, D] and of K [B, Hkv, D], as `channel_tops` finds them."""

    q: Buffer
    k: Buffer


@triton.jit
def _hadamard(x, D: tl.constexpr):
    """Rows [ROWS, D] through the orthonormal Hadamard matrix, to 2**-22 of a row's largest value.

    Element (i, j) of the matrix is negative where i & j has an odd number of bits; 1 and -1 are exact in float16.
    """
    o_d = tl.arange(0, D)
    b_odd = o_d[:, None] & o_d[None, :]
    b_odd ^= b_odd >> 4
    b_odd ^= b_odd >> 2
    b_odd ^= b_odd >> 1
    b_sign = (1 - 2 * (b_odd & 1)).to(tl.float16)
    b_most = tl.maximum(tl.max(tl.abs(x), 1), TINY)
    b_x = x * (1.0 / b_most)[:, None]  # to float16's range
    b_high = b_x.to(tl.float16)
    b_low = (b_x - b_high.to(tl.float32)).to(tl.float16)
    return tl.dot(b_high, b_sign, tl.dot(b_low, b_sign)) * (b_most * D ** -0.5)[:, None]


@triton.jit(do_not_specialize=["H", "N", "scale_stride_b", "scale_stride_h", "row_stride_b", "row_stride_h"])
def quant_rotated_kernel(x, codes, scale, q_top, k_top, mean, lse_shift, k_mean, bias, q_mean, cu_seqlens,
                         stride_b, stride_h, stride_n, codes_stride_b, codes_stride_h, scale_stride_b, scale_stride_h,
                         row_stride_b, row_stride_h, sm_scale, H, N, MAX_CODE: tl.constexpr, D: tl.constexpr,
                         ROWS: tl.constexpr, FORMAT: tl.constexpr, PER_TOKEN: tl.constexpr, OF_Q: tl.constexpr,
                         GROUP: tl.constexpr, SMOOTH: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
                         VARLEN: tl.constexpr, INTERPRET: tl.constexpr):
    """One tile of ROWS rows (at block granularity: one block) of one head, backwards as in `quant_qk`."""
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = tl.num_programs(2) - 1 - tl.program_id(2)
    i_hk, heads_k = i_h, H
    if OF_Q:
        i_hk, heads_k = i_h // GROUP, H // GROUP
    start, n, scale_start = 0, N, i_t
    if VARLEN:
        start = tl.load(cu_seqlens + i_b)
        n = tl.load(cu_seqlens + i_b + 1) - start
        scale_start = start // ROWS + i_b + i_t
    if i_t * ROWS < n:
        o_n = i_t * ROWS + tl.arange(0, ROWS)
        o_row = (start + o_n).to(tl.int64)
        o_d = tl.arange(0, D)
        m_n = o_n < n
        p_x = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h + o_row[:, None] * stride_n + o_d[None, :]
        # [ROWS, D]
        b_x = tl.load(p_x, mask=m_n[:, None], other=0.0).to(tl.float32)
        p_row = i_b.to(tl.int64) * row_stride_b + o_row
        p_k = (i_b * heads_k + i_hk) * D + o_d
        p_q = (i_b * heads_k + i_hk) * GROUP * D + o_d
        if SHIFT:
            b_shift = tl.sum(b_x * tl.load(k_mean + p_k)[None, :], 1) * sm_scale
            tl.store(lse_shift + p_row + i_h.to(tl.int64) * row_stride_h, b_shift, mask=m_n)
        if SMOOTH:
            b_x = tl.where(m_n[:, None], b_x - tl.load(mean + (i_b * H + i_h) * D + o_d)[None, :], 0.0)
        if BIAS:
            for i_g in tl.static_range(GROUP):
                b_qm = tl.load(q_mean + p_q + i_g * D)
                tl.store(bias + p_row + (i_h * GROUP + i_g).to(tl.int64) * row_stride_h, tl.sum(b_x * b_qm[None, :], 1),
                         mask=m_n)

        b_q = tl.full([D], TINY, tl.float32)
        for i_g in tl.static_range(GROUP):
            b_q = tl.maximum(b_q, tl.load(q_top + p_q + i_g * D))
        b_k = tl.maximum(tl.load(k_top + p_k), TINY)
        if OF_Q:
            b_factor = tl.sqrt(b_k / b_q)
        else:
            b_factor = tl.sqrt(b_q / b_k)
        b_x = _hadamard(b_x * b_factor[None, :], D)

        write_codes(b_x, codes + i_b.to(tl.int64) * codes_stride_b + i_h.to(tl.int64) * codes_stride_h,
                    scale + i_b.to(tl.int64) * scale_stride_b + i_h.to(tl.int64) * scale_stride_h, o_row, m_n, scale_start,
                    tl.minimum(n - i_t * ROWS, ROWS), MAX_CODE, D, D, ROWS, FORMAT, PER_TOKEN, INTERPRET)


def launch_quant_rotated(x: Operand, codes: Operand, sequences: Sequences | None = None, *, tops: Tops, of: str,
                         mean: Buffer | None = None, lse_shift: Buffer | None = None, k_mean: Buffer | None = None,
                         sm_scale: float = 1.0, bias: Buffer | None = None, q_mean: Buffer | None = None,
                         group: int = 1) -> None:
    """Codes and float32 scales of x rotated; x, codes, sequences and what is smoothed are as in `launch_quant_qk`.

    tops: without the means that are subtracted here. of: "q" or "k". group: query heads to a head of keys, always.
    """
    batch, heads, tokens, head_dim = x.shape
    assert head_dim in ROTATED, head_dim
    packed, per_token = sequences is not None, codes.block is None
    rows = TOKEN_ROWS if per_token else codes.block
    scales = scale_count(tokens, codes.block, batch if packed else None)
    launch(
        quant_rotated_kernel, (ceil_div(sequences.longest if packed else tokens, rows), heads, batch),
        x.buffer, codes.buffer, codes.scale, tops.q, tops.k, mean, lse_shift, k_mean, bias, q_mean,
        sequences.cu if packed else None, *x.strides, *codes.strides[:2], *row_strides(heads, scales, packed),
        *row_strides(heads * group if of == "k" else heads, tokens, packed), float(sm_scale), heads, tokens,
        MAX_CODE=get_format(codes.format).max_code, D=head_dim, ROWS=rows, FORMAT=codes.format, PER_TOKEN=per_token,
        OF_Q=of == "q", GROUP=group, SMOOTH=mean is not None, SHIFT=lse_shift is not None, BIAS=bias is not None, VARLEN=packed,
        INTERPRET=bool(triton.knobs.runtime.interpret), num_warps=8 if rows * head_dim > 8192 else 4)
