"""V to FP8 e4m3 with per-channel scales, stored transposed and permuted for the P.V product.

FP8 tensor cores want the B operand K-major, hence [D, N]. The key index is permuted within every 16
(formats.PERMUTATION_16), so that P needs no shuffle between the two products: rows are simply read in that order.
"""
from __future__ import annotations

from ..formats import BLOCK_K, get_format
from ..fp8 import to_fp8
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand, Sequences
from .shapes import ceil_div

FP8_MAX = tl.constexpr(get_format("fp8").max_code)


@triton.jit(do_not_specialize=["H", "N"])
def quant_v_kernel(v, codes, v_scale, cu_seqlens, stride_b, stride_h, stride_n, codes_stride_b, codes_stride_h, codes_stride_d,
                   H, N, D: tl.constexpr, PAD_D: tl.constexpr, BLOCK: tl.constexpr, VARLEN: tl.constexpr,
                   INTERPRET: tl.constexpr):
    """One [BLOCK, D] tile of v to a [D, BLOCK] tile of codes; keys past the end become zero."""
    # backwards: what the statistics read last is still in the L2 cache
    i_t = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.num_programs(1) - 1 - tl.program_id(1)
    i_b = tl.num_programs(2) - 1 - tl.program_id(2)
    start, n, code_start = 0, N, 0
    if VARLEN:
        start = tl.load(cu_seqlens + i_b)
        n = tl.load(cu_seqlens + i_b + 1) - start
        code_start = (start // BLOCK + i_b) * BLOCK
    if i_t * BLOCK < n:
        o_n = tl.arange(0, BLOCK)
        # position 4t+2h+e of 16 holds row 8h+2t+e
        o_row = i_t * BLOCK + (o_n // 16) * 16 + (o_n // 2 % 2) * 8 + (o_n // 4 % 4) * 2 + o_n % 2
        o_d = tl.arange(0, PAD_D)
        m_v = (o_row < n)[:, None] & (o_d < D)[None, :]
        p_v = v + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
        # [BLOCK, PAD_D]
        b_v = tl.load(p_v + (start + o_row).to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m_v, other=0.0).to(tl.float32)
        b_inv = 1.0 / tl.load(v_scale + (i_b * H + i_h) * D + o_d, mask=o_d < D, other=1.0)
        # the reciprocal's rounding must not lift the absmax past 448
        b_c = to_fp8(tl.minimum(tl.maximum(b_v * b_inv[None, :], -FP8_MAX), FP8_MAX), INTERPRET)
        p_c = codes + i_b.to(tl.int64) * codes_stride_b + i_h.to(tl.int64) * codes_stride_h + code_start + i_t * BLOCK
        tl.store(p_c + o_d[:, None].to(tl.int64) * codes_stride_d + o_n[None, :], tl.trans(b_c), mask=(o_d < D)[:, None])


def launch_quant_v(v: Operand, codes: Operand, sequences: Sequences | None = None, scale_heads: int | None = None) -> None:
    """Codes of v: e4m3 [B, H, D, Npad], Npad = ceil(N / 128) * 128, permuted within 16, tail zero.

    codes: of `operands.v_codes_of`, whose scale [B, H, D] float32 `launch_stats` has written. With sequences: v's shape is
    (S, H, T, D), codes [H, D, (T // 128 + S) * 128], sequence s from column (cu[s] // 128 + s) * 128. scale_heads: of the
    scales, where those begin at v's first head and have more than v.
    """
    batch, heads, tokens, head_dim = v.shape
    packed = sequences is not None
    tiles = ceil_div(sequences.longest if packed else tokens, BLOCK_K)
    launch(
        quant_v_kernel, (tiles, heads, batch), v.buffer, codes.buffer, codes.scale, sequences.cu if packed else None,
        *v.strides, *codes.strides, scale_heads or heads, tokens,
        D=head_dim, PAD_D=triton.next_power_of_2(head_dim), BLOCK=BLOCK_K, VARLEN=packed,
        INTERPRET=bool(triton.knobs.runtime.interpret), num_warps=4 if head_dim <= 64 else 8)
