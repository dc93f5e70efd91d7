"""V in two pieces to codes as `quant.quant_v` makes them, whose builds are shipped and read one piece."""
from __future__ import annotations

from ..formats import BLOCK_K
from ..fp8 import to_fp8
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand
from ..quant.quant_v import FP8_MAX
from ..quant.shapes import ceil_div
from .rows import rows_of
from .stats import rest_arguments
from .steps import Steps


@triton.jit(do_not_specialize=["H", "N", "seam"])
def prologue_values_kernel(v, codes, v_scale, stride_b, stride_h, stride_n, codes_stride_b, codes_stride_h, codes_stride_d,
                           rest, rest_stride_b, rest_stride_h, rest_stride_n, seam, H, N, D: tl.constexpr, BLOCK: tl.constexpr,
                           INTERPRET: tl.constexpr):
    """One [BLOCK, D] tile of v to a [D, BLOCK] tile of codes; keys past the end become zero."""
    # backwards: what the statistics read last is still in the L2 cache
    i_t, i_h = tl.num_programs(0) - 1 - tl.program_id(0), (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    i_b = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    o_n, o_d = tl.arange(0, BLOCK), tl.arange(0, D)
    # position 4t+2h+e of 16 holds row 8h+2t+e
    o_row = i_t * BLOCK + (o_n // 16) * 16 + (o_n // 2 % 2) * 8 + (o_n // 4 % 4) * 2 + o_n % 2
    # [BLOCK, D]
    b_v = rows_of(v + i_b * stride_b + i_h * stride_h, stride_n, (rest, rest_stride_b, rest_stride_h, rest_stride_n), seam, i_b,
                  i_h, o_row, o_row < N, D)
    b_inv = 1.0 / tl.load(v_scale + (i_b * H + i_h) * D + o_d)
    # the reciprocal's rounding must not lift the absmax past 448
    b_c = to_fp8(tl.minimum(tl.maximum(b_v * b_inv[None, :], -FP8_MAX), FP8_MAX), INTERPRET)
    p_c = codes + i_b * codes_stride_b + i_h * codes_stride_h + i_t * BLOCK
    tl.store(p_c + o_d[:, None].to(tl.int64) * codes_stride_d + o_n[None, :], tl.trans(b_c))


def launch_prologue_values(v: Operand, codes: Operand, steps: Steps) -> None:
    """Codes of v [B, H, N, D] as `launch_quant_v` leaves them. steps: whose rest has v's other tokens; as
    `launch_prologue_stats`, which has written the scales."""
    batch, heads, tokens, head_dim = v.shape
    launch(prologue_values_kernel, (ceil_div(tokens, BLOCK_K), heads, batch), v.buffer, codes.buffer, codes.scale, *v.strides,
           *codes.strides, *rest_arguments(steps, v.shape, "v"), heads, tokens, D=head_dim, BLOCK=BLOCK_K,
           INTERPRET=bool(triton.knobs.runtime.interpret), num_warps=4 if head_dim <= 64 else 8)
