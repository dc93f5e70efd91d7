"""Q and K normed and turned in one reading and written in their own dtype, for what does not quantise them next."""
from __future__ import annotations

from ..language import tl, triton
from ..launch import launch
from ..operands import Operand
from ..quant.shapes import ceil_div
from .rows import prepared_rows, rotary_tile
from .stats import HEADS, norm_arguments, scalars
from .steps import Steps

ROWS = 64
"""Tokens of a tile: no scale is shared here, and of 128 rows of head dim 128 some would be spilled."""


@triton.jit(do_not_specialize=["H", "N", "begin", "turned"])
def prologue_apart_kernel(q, k, q_out, k_out, q_weight, q_bias, k_weight, k_bias, cos, sin, q_stride_b, q_stride_h, q_stride_n,
                          k_stride_b, k_stride_h, k_stride_n, q_out_stride_b, q_out_stride_h, q_out_stride_n, k_out_stride_b,
                          k_out_stride_h, k_out_stride_n, eps, H, N, begin, turned, D: tl.constexpr, ROWS: tl.constexpr,
                          HEADS: tl.constexpr, NORM: tl.constexpr, ROUNDS_FIRST: tl.constexpr, INTERPRET: tl.constexpr):
    """One tile of ROWS tokens of up to HEADS heads."""
    i_t, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    ROTARY: tl.constexpr = cos is not None
    o_n = i_t * ROWS + tl.arange(0, ROWS)
    o_row, m_n = o_n.to(tl.int64)[:, None], o_n < N
    o_d = tl.arange(0, D)[None, :]
    b_cos, b_sin = None, None
    if ROTARY:
        b_cos, b_sin = rotary_tile(cos, sin, o_n, begin, turned, D, ROWS)
    i_first = tl.program_id(1) * HEADS
    for i_one in range(0, tl.minimum(HEADS, H - i_first)):
        i_h = (i_first + i_one).to(tl.int64)
        b_x = prepared_rows(q + i_b * q_stride_b + i_h * q_stride_h, q_stride_n, (None, 0, 0, 0), 0, i_b, i_h, o_n, m_n,
                            q_weight, q_bias, eps, b_cos, b_sin, D, ROWS, NORM, ROUNDS_FIRST, ROTARY, INTERPRET)
        p_out = q_out + i_b * q_out_stride_b + i_h * q_out_stride_h
        tl.store(p_out + o_row * q_out_stride_n + o_d, b_x.to(q_out.dtype.element_ty), mask=m_n[:, None])
        b_x = prepared_rows(k + i_b * k_stride_b + i_h * k_stride_h, k_stride_n, (None, 0, 0, 0), 0, i_b, i_h, o_n, m_n,
                            k_weight, k_bias, eps, b_cos, b_sin, D, ROWS, NORM, ROUNDS_FIRST, ROTARY, INTERPRET)
        p_out = k_out + i_b * k_out_stride_b + i_h * k_out_stride_h
        tl.store(p_out + o_row * k_out_stride_n + o_d, b_x.to(k_out.dtype.element_ty), mask=m_n[:, None])


def launch_prologue_apart(q: Operand, k: Operand, q_out: Operand, k_out: Operand, steps: Steps,
                          how: tuple[int, int] | None = None) -> None:
    """Writes q and k [B, H, N, D], as the projections left them, behind their steps into q_out and k_out, of their dtype.

    Any strides but of the last dimension. steps: without a rest, otherwise as `launch_prologue_stats`. how: heads of a program,
    which share a tile of rotary tables, and its warps.
    """
    batch, heads, tokens, head_dim = q.shape
    together, warps = how or (HEADS if steps.rotary else 1, 4 if head_dim <= 64 else 8)
    buffers, constants = norm_arguments(steps)
    eps, begin, turned = scalars(steps)
    launch(prologue_apart_kernel, (ceil_div(tokens, ROWS), ceil_div(heads, together), batch), q.buffer, k.buffer, q_out.buffer,
           k_out.buffer, *buffers, *q.strides, *k.strides, *q_out.strides, *k_out.strides, eps, heads, tokens, begin, turned,
           D=head_dim, ROWS=ROWS, HEADS=together, **constants, num_warps=warps)
