"""INT8 rows back to values, each put where it belongs among all heads."""
from __future__ import annotations

from ..language import tl, triton
from ..launch import launch
from ..operands import Operand
from ..quant.shapes import ceil_div

ROWS = 64


@triton.jit(do_not_specialize=["N"])
def dequant_rows_kernel(codes, scale, out, codes_stride_b, codes_stride_h, scale_stride_b, scale_stride_h, out_stride_b,
                        out_stride_h, out_stride_n, N, D: tl.constexpr, PAD_D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of one (batch, head): out = codes * scale."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, PAD_D)
    m_n = o_n < N
    m_x = m_n[:, None] & (o_d < D)[None, :]
    o_row = o_n.to(tl.int64)[:, None]
    b_c = tl.load(codes + i_b * codes_stride_b + i_h * codes_stride_h + o_row * D + o_d[None, :], mask=m_x, other=0)
    b_s = tl.load(scale + i_b * scale_stride_b + i_h * scale_stride_h + o_n, mask=m_n, other=0.0)
    p_out = out + i_b * out_stride_b + i_h * out_stride_h + o_row * out_stride_n + o_d[None, :]
    tl.store(p_out, (b_c.to(tl.float32) * b_s[:, None]).to(out.dtype.element_ty), mask=m_x)


def launch_dequant_rows(codes: Operand, out: Operand) -> None:
    """out [B, H, N, D], by its strides, from INT8 codes with a scale a row.

    codes: rows contiguous; strides of batch and head, and `scale_strides` of its scales.
    """
    batch, heads, tokens, head_dim = codes.shape
    launch(dequant_rows_kernel, (ceil_div(tokens, ROWS), heads, batch), codes.buffer, codes.scale, out.buffer,
           *codes.strides[:2], *codes.scale_strides, *out.strides, tokens, D=head_dim, PAD_D=triton.next_power_of_2(head_dim),
           ROWS=ROWS, num_warps=4)
