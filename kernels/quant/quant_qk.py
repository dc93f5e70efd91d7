"""Q or K to int8, int4, int2 or FP8 codes, per block or per row, in one pass over the input.

The mean over tokens (smoothing) is subtracted on the way, and what smoothing takes from the scores is
written by the same pass: Q's pass gives the LSE shift, K's pass the score bias.
"""
from __future__ import annotations

from ..buffers import Buffer
from ..formats import get_format
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand, Sequences
from .shapes import ceil_div, row_strides, scale_count
from .write_codes import write_codes

TOKEN_ROWS = 64
"""Rows that one program quantises where each has a scale of its own."""


@triton.jit(do_not_specialize=["H", "N", "scale_stride_b", "scale_stride_h", "row_stride_b", "row_stride_h"])
def quant_qk_kernel(x, codes, scale, mean, lse_shift, k_mean, bias, q_mean, cu_seqlens,
                    stride_b, stride_h, stride_n, codes_stride_b, codes_stride_h, scale_stride_b, scale_stride_h,
                    row_stride_b, row_stride_h, sm_scale, H, N, MAX_CODE: tl.constexpr,
                    D: tl.constexpr, PAD_D: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, PER_TOKEN: tl.constexpr,
                    GROUP: tl.constexpr, SMOOTH: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, VARLEN: tl.constexpr,
                    INTERPRET: tl.constexpr):
    """One tile of ROWS rows (at block granularity: one block) of one head."""
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SMOOTH:
        # backwards: what the mean's pass read last is still in the L2 cache
        i_t, i_h, i_b = tl.num_programs(0) - 1 - i_t, tl.num_programs(1) - 1 - i_h, tl.num_programs(2) - 1 - i_b
    start, n, scale_start = 0, N, i_t
    if VARLEN:
        start = tl.load(cu_seqlens + i_b)
        n = tl.load(cu_seqlens + i_b + 1) - start
        scale_start = start // ROWS + i_b + i_t
    if i_t * ROWS < n:
        o_n = i_t * ROWS + tl.arange(0, ROWS)
        o_row = (start + o_n).to(tl.int64)
        o_d = tl.arange(0, PAD_D)
        m_n = o_n < n
        m_d = o_d < D
        p_x = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h + o_row[:, None] * stride_n + o_d[None, :]
        # [ROWS, PAD_D]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        p_row = i_b.to(tl.int64) * row_stride_b + o_row
        if SHIFT:
            b_km = tl.load(k_mean + (i_b * (H // GROUP) + i_h // GROUP) * D + o_d, mask=m_d, other=0.0)
            b_shift = tl.sum(b_x * b_km[None, :], 1) * sm_scale
            tl.store(lse_shift + p_row + i_h.to(tl.int64) * row_stride_h, b_shift, mask=m_n)
        if SMOOTH:
            b_mean = tl.load(mean + (i_b * H + i_h) * D + o_d, mask=m_d, other=0.0)
            b_x = b_x - b_mean[None, :]
            if not PER_TOKEN:  # a block's scale must not see the rows past the end
                b_x = tl.where(m_n[:, None], b_x, 0.0)
        if BIAS:
            for i_g in tl.static_range(GROUP):
                i_hq = i_h * GROUP + i_g
                b_qm = tl.load(q_mean + (i_b * (H * GROUP) + i_hq) * D + o_d, mask=m_d, other=0.0)
                tl.store(bias + p_row + i_hq.to(tl.int64) * row_stride_h, tl.sum(b_x * b_qm[None, :], 1), mask=m_n)

        p_scale = scale + i_b.to(tl.int64) * scale_stride_b + i_h.to(tl.int64) * scale_stride_h
        p_codes = codes + i_b.to(tl.int64) * codes_stride_b + i_h.to(tl.int64) * codes_stride_h
        write_codes(b_x, p_codes, p_scale, o_row, m_n, scale_start, tl.minimum(n - i_t * ROWS, ROWS), MAX_CODE, D, PAD_D, ROWS,
                    FORMAT, PER_TOKEN, INTERPRET)


def launch_quant_qk(x: Operand, codes: Operand, sequences: Sequences | None = None, *, mean: Buffer | None = None,
                    lse_shift: Buffer | None = None, k_mean: Buffer | None = None, sm_scale: float = 1.0,
                    bias: Buffer | None = None, q_mean: Buffer | None = None, group: int = 1,
                    token_strides: tuple[int, int] | None = None, stat_heads: int | None = None) -> None:
    """Codes and float32 scales of x, as `codes` (of `operands.codes_of`) describes them.

    codes: [B, H, N, D / codes_per_byte] contiguous; its scale: [B, H, ceil(N / block)], or [B, H, N] where block is None.
    mean [B, H, D]: subtracted first. lse_shift [B, H, N] with k_mean [B, H / group, D], for Q: sm_scale * (x . k_mean) of the
    unsmoothed rows. bias [B, H * group, N] with q_mean [B, H * group, D], for K: q_mean . (x - mean), unscaled.
    token_strides: of batch and head of lse_shift and bias, where they are not contiguous. stat_heads: of mean, k_mean and
    q_mean, where those begin at x's first head and have more than x (group 1 only).
    With sequences: x's shape is (S, H, T, D); codes [H, T, ..], token scales, lse_shift and bias [.., T], block scales
    [H, T // block + S] (sequence s from cu[s] // block + s).
    """
    batch, heads, tokens, head_dim = x.shape
    fmt = get_format(codes.format)
    if head_dim % fmt.codes_per_byte:
        raise ValueError(f"head_dim {head_dim} does not divide by {fmt}'s {fmt.codes_per_byte} codes a byte")
    packed = sequences is not None
    per_token = codes.block is None
    rows = TOKEN_ROWS if per_token else codes.block
    shift = lse_shift is not None
    scales = scale_count(tokens, codes.block, batch if packed else None)
    launch(
        quant_qk_kernel, (ceil_div(sequences.longest if packed else tokens, rows), heads, batch),
        x.buffer, codes.buffer, codes.scale, mean, lse_shift, k_mean, bias, q_mean, sequences.cu if packed else None,
        *x.strides, *codes.strides[:2], *(codes.scale_strides or row_strides(heads, scales, packed)),
        *(token_strides or row_strides(heads * group if bias is not None else heads, tokens, packed)), float(sm_scale),
        stat_heads or heads, tokens,
        MAX_CODE=fmt.max_code, D=head_dim, PAD_D=triton.next_power_of_2(head_dim), ROWS=rows, FORMAT=codes.format,
        PER_TOKEN=per_token, GROUP=group if shift or bias is not None else 1, SMOOTH=mean is not None, SHIFT=shift,
        BIAS=bias is not None, VARLEN=packed, INTERPRET=bool(triton.knobs.runtime.interpret),
        num_warps=8 if rows * head_dim > 8192 else 4)
