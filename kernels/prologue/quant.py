"""Q and K to codes as `quant.quant_qk` makes them, normed and turned on the way: the fused prologue's second reading.

One launch for both; a program takes a tile of tokens of some heads, which share its rotary tables. V has no steps of its own:
`quant.quant_v` reads it as the projection left it.
"""
from __future__ import annotations

from ..buffers import Buffer
from ..formats import get_format
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand
from ..quant.shapes import ceil_div, row_strides, scale_count
from ..quant.write_codes import write_codes
from .rows import prepared_rows, rotary_tile
from .stats import how_built, norm_arguments, rest_arguments, scalars
from .steps import ROWS, Steps

REGISTERS = 128
"""Of a thread of eight warps that read two pieces, head dim 64 or less: two programs fit on a multiprocessor, as of one piece.

With rotary positions ptxas takes 172 where it is left alone, and spills nothing at 128.
"""


@triton.jit(do_not_specialize=["H", "N", "begin", "turned", "q_scale_stride_b", "q_scale_stride_h", "k_scale_stride_b",
                               "k_scale_stride_h", "shift_stride_b", "shift_stride_h", "score_stride_b", "score_stride_h",
                               "seam"])
def prologue_quant_kernel(q, k, q_codes, k_codes, q_scale, k_scale, q_mean, k_mean, lse_shift, score_bias, q_weight, q_bias,
                          k_weight, k_bias, cos, sin, q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n,
                          q_codes_stride_b, q_codes_stride_h, k_codes_stride_b, k_codes_stride_h, q_scale_stride_b,
                          q_scale_stride_h, k_scale_stride_b, k_scale_stride_h, shift_stride_b, shift_stride_h,
                          score_stride_b, score_stride_h, q_rest, k_rest, q_rest_stride_b, q_rest_stride_h, q_rest_stride_n,
                          k_rest_stride_b, k_rest_stride_h, k_rest_stride_n, seam, sm_scale, eps, H, N, begin, turned,
                          Q_MAX: tl.constexpr,
                          K_MAX: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
                          Q_FORMAT: tl.constexpr, K_FORMAT: tl.constexpr, K_PER_TOKEN: tl.constexpr, NORM: tl.constexpr,
                          ROUNDS_FIRST: tl.constexpr, INTERPRET: tl.constexpr):
    """One tile of ROWS tokens of up to HEADS heads, K first."""
    # backwards: what the statistics read last is still in the L2 cache
    i_t, i_g = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    ROTARY: tl.constexpr = cos is not None
    o_n = i_t * ROWS + tl.arange(0, ROWS)
    o_row, rows = o_n.to(tl.int64), tl.minimum(N - i_t * ROWS, ROWS)
    m_n = o_n < N
    o_d = tl.arange(0, D)
    b_cos, b_sin = None, None
    if ROTARY:
        b_cos, b_sin = rotary_tile(cos, sin, o_n, begin, turned, D, ROWS)
    i_first = i_g * HEADS
    for i_one in range(0, tl.minimum(HEADS, H - i_first)):
        i_h = (i_first + i_one).to(tl.int64)
        o_mean = (i_b * H + i_h) * D + o_d
        rest = (k_rest, k_rest_stride_b, k_rest_stride_h, k_rest_stride_n)
        b_x = prepared_rows(k + i_b * k_stride_b + i_h * k_stride_h, k_stride_n, rest, seam, i_b, i_h, o_n, m_n, k_weight,
                            k_bias, eps, b_cos, b_sin, D, ROWS, NORM, ROUNDS_FIRST, ROTARY, INTERPRET)
        if k_mean is not None:
            b_x = tl.where(m_n[:, None], b_x - tl.load(k_mean + o_mean)[None, :], 0.0)
        if score_bias is not None:
            b_bias = tl.sum(b_x * tl.load(q_mean + o_mean)[None, :], 1)
            tl.store(score_bias + i_b * score_stride_b + i_h * score_stride_h + o_n, b_bias, mask=m_n)
        write_codes(b_x, k_codes + i_b * k_codes_stride_b + i_h * k_codes_stride_h,
                    k_scale + i_b * k_scale_stride_b + i_h * k_scale_stride_h, o_row, m_n, i_t, rows, K_MAX, D, D, ROWS,
                    K_FORMAT, K_PER_TOKEN, INTERPRET)
        rest = (q_rest, q_rest_stride_b, q_rest_stride_h, q_rest_stride_n)
        b_x = prepared_rows(q + i_b * q_stride_b + i_h * q_stride_h, q_stride_n, rest, seam, i_b, i_h, o_n, m_n, q_weight,
                            q_bias, eps, b_cos, b_sin, D, ROWS, NORM, ROUNDS_FIRST, ROTARY, INTERPRET)
        if lse_shift is not None:
            b_shift = tl.sum(b_x * tl.load(k_mean + o_mean)[None, :], 1) * sm_scale
            tl.store(lse_shift + i_b * shift_stride_b + i_h * shift_stride_h + o_n, b_shift, mask=m_n)
        if q_mean is not None:
            b_x -= tl.load(q_mean + o_mean)[None, :]
        write_codes(b_x, q_codes + i_b * q_codes_stride_b + i_h * q_codes_stride_h,
                    q_scale + i_b * q_scale_stride_b + i_h * q_scale_stride_h, o_row, m_n, i_t, rows, Q_MAX, D, D, ROWS,
                    Q_FORMAT, True, INTERPRET)


def launch_prologue_quant(q: Operand, k: Operand, q_codes: Operand, k_codes: Operand, steps: Steps, *,
                          q_mean: Buffer | None = None, k_mean: Buffer | None = None, lse_shift: Buffer | None = None,
                          score_bias: Buffer | None = None, sm_scale: float = 1.0, how: tuple[int, int] | None = None) -> None:
    """Codes and float32 scales of q and k [B, H, N, D], as the projections left them, after their steps.

    q_codes, k_codes: of `operands.codes_of`; Q has a scale a row, K one a row or one for 128. q_mean, k_mean: of
    `launch_prologue_stats`, subtracted; None: not. lse_shift (with k_mean) and score_bias (with q_mean), [B, H, N]: what
    smoothing takes from the scores, as `launch_quant_qk` writes them. steps, how: as `launch_prologue_stats`.
    """
    batch, heads, tokens, head_dim = q.shape
    assert q_codes.block is None and k_codes.block in (None, ROWS), (q_codes.block, k_codes.block)
    together, warps = how or how_built(steps, head_dim)
    scale_strides = lambda codes: codes.scale_strides or row_strides(heads, scale_count(tokens, codes.block), False)
    rows = row_strides(heads, tokens, False)
    buffers, constants = norm_arguments(steps)
    eps, begin, turned = scalars(steps)
    launch(prologue_quant_kernel, (ceil_div(tokens, ROWS), ceil_div(heads, together), batch), q.buffer, k.buffer,
           q_codes.buffer, k_codes.buffer, q_codes.scale, k_codes.scale, q_mean, k_mean, lse_shift, score_bias, *buffers,
           *q.strides, *k.strides, *q_codes.strides[:2], *k_codes.strides[:2], *scale_strides(q_codes),
           *scale_strides(k_codes), *rows, *rows, *rest_arguments(steps, q.shape, "qk"),
           float(sm_scale), eps, heads, tokens, begin, turned,
           Q_MAX=get_format(q_codes.format).max_code, K_MAX=get_format(k_codes.format).max_code, D=head_dim, ROWS=ROWS,
           HEADS=together, Q_FORMAT=q_codes.format, K_FORMAT=k_codes.format, K_PER_TOKEN=k_codes.block is None, **constants,
           num_warps=warps, maxnreg=REGISTERS if steps.rest is not None and warps == 8 and head_dim <= 64 else None)
