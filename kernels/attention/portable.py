"""Portable attention forward in Triton: one source for every precision, from sm_80 on.

int8, int4, int2 and FP8 scores, dequantised inside the softmax scale, P.V in 16 bits or in FP8, and exact
attention with the same loop. Softmax is in base 2 with float32 state. What makes it fast: the row maximum
of integer scores is an integer maximum, row sums stay in lanes until the end, only tiles that need a mask
pay for one, FP8 V is stored so that P needs no shuffle, and K and V come through TMA where there is one.
Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; SageAttention2 (arXiv 2411.10958), FP8 P.V with
two-level accumulation; here P's scale is a constant 2**8 and V's keys are permuted in memory.
"""
from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..buffers import Buffer
from ..formats import BLOCK_K, EXACT_FORMATS, LN_2, LOG2_E, MIN_SCORE, P_SHIFT, get_format
from ..fp8 import to_fp8
from ..launch import launch
from ..operands import Listed, Operand, Packed
from ..quant.shapes import ceil_div, row_strides, scale_count, v_tokens
from ..tuning import TileConfig, family, lookup

SCALE_KEYS = tl.constexpr(BLOCK_K)
LN2 = tl.constexpr(LN_2)
NEVER = tl.constexpr(MIN_SCORE)
FP8_SHIFT = tl.constexpr(P_SHIFT)
MASKED_INT = tl.constexpr(-(1 << 28))
"""Below every int8 score, above int32's end."""
P_DTYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
SUM_COLUMNS = tl.constexpr(8)
"""Columns of ones that P is multiplied by for its row sums: the narrowest product there is."""
DECODE_FACTOR = {"int8": 1.0, "int4": 1 / 8, "int2": 1 / 32, "fp8": 1.0}
"""What a code unpacked in registers must be multiplied by: int4 unpacks to 8 * (2c + 1), int2 to 32 * (2c + 1)."""


def _unpack_asm(shift: int, mask: int, odd: int) -> tl.constexpr:
    """PTX that turns one field of four packed bytes into four int8: (x << shift) & mask | odd, in every byte."""
    every, odds = f"0x{mask * 0x01010101:08X}", f"0x{odd * 0x01010101:08X}"
    return tl.constexpr(f"{{ .reg .b32 t; shl.b32 t, $1, {shift}; lop3.b32 $0, t, {every}, {odds}, 0xEA; }}")


INT4_LOW, INT4_HIGH = _unpack_asm(4, 0xF0, 0x08), _unpack_asm(0, 0xF0, 0x08)
INT2_0, INT2_1, INT2_2, INT2_3 = (_unpack_asm(shift, 0xC0, 0x20) for shift in (6, 4, 2, 0))


@triton.jit
def _field(x, ASM: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr, ODD: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:
        b_y = (((x << SHIFT) & MASK) | ODD).to(tl.int8, bitcast=True)
    else:
        b_y = tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4)
    return b_y


@triton.jit
def _unpack(x, FORMAT: tl.constexpr, ROWS: tl.constexpr, PAD_D: tl.constexpr, INTERPRET: tl.constexpr):
    """int8 [ROWS, PAD_D] of packed bytes; four bytes of one field stay together, so that unpacking moves no registers.

    int4: position 8g + 4e + j holds element 8g + 2j + e; int2: 16g + 4c + j holds 16g + 4j + c.
    """
    if FORMAT == "int4":
        b_0 = tl.reshape(_field(x, INT4_LOW, 4, 0xF0, 0x08, INTERPRET), [ROWS, PAD_D // 8, 4])
        b_1 = tl.reshape(_field(x, INT4_HIGH, 0, 0xF0, 0x08, INTERPRET), [ROWS, PAD_D // 8, 4])
        b_y = tl.reshape(tl.permute(tl.join(b_0, b_1), (0, 1, 3, 2)), [ROWS, PAD_D])
    else:
        b_0 = tl.reshape(_field(x, INT2_0, 6, 0xC0, 0x20, INTERPRET), [ROWS, PAD_D // 16, 4])
        b_1 = tl.reshape(_field(x, INT2_1, 4, 0xC0, 0x20, INTERPRET), [ROWS, PAD_D // 16, 4])
        b_2 = tl.reshape(_field(x, INT2_2, 2, 0xC0, 0x20, INTERPRET), [ROWS, PAD_D // 16, 4])
        b_3 = tl.reshape(_field(x, INT2_3, 0, 0xC0, 0x20, INTERPRET), [ROWS, PAD_D // 16, 4])
        b_y = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
        b_y = tl.reshape(tl.permute(b_y, (0, 1, 3, 4, 2)), [ROWS, PAD_D])
    return b_y


@triton.jit
def _to_unpacked_order(x, FORMAT: tl.constexpr, ROWS: tl.constexpr, PAD_D: tl.constexpr):
    """Columns of x [ROWS, PAD_D] in the order in which `_unpack` leaves FORMAT's elements."""
    if FORMAT == "int4":
        x = tl.reshape(tl.permute(tl.reshape(x, [ROWS, PAD_D // 8, 4, 2]), (0, 1, 3, 2)), [ROWS, PAD_D])
    elif FORMAT == "int2":
        x = tl.reshape(tl.permute(tl.reshape(x, [ROWS, PAD_D // 16, 4, 4]), (0, 1, 3, 2)), [ROWS, PAD_D])
    return x


@triton.jit
def _load_q(p_q, o_m, m_m, stride_n, Q_FORMAT: tl.constexpr, K_FORMAT: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr,
            BM: tl.constexpr, INTERPRET: tl.constexpr):
    """Q's tile [BM, PAD_D], columns in K's unpacked order, those past D zero."""
    if Q_FORMAT == "int4" or Q_FORMAT == "int2":
        PACK: tl.constexpr = 2 if Q_FORMAT == "int4" else 4
        o_p = tl.arange(0, PAD_D // PACK)
        b_q = tl.load(p_q + o_m[:, None] * stride_n + o_p[None, :], mask=m_m[:, None] & (o_p < D // PACK)[None, :], other=0)
        b_q = _unpack(b_q, Q_FORMAT, BM, PAD_D, INTERPRET)
        if D < PAD_D:
            o_d = tl.arange(0, PAD_D)
            o_e = o_d // 8 * 8 + o_d % 4 * 2 + o_d // 4 % 2
            if Q_FORMAT == "int2":
                o_e = o_d // 16 * 16 + o_d % 4 * 4 + o_d // 4 % 4
            b_q = tl.where((o_e < D)[None, :], b_q, 0)
    else:
        o_d = tl.arange(0, PAD_D)
        b_q = tl.load(p_q + o_m[:, None] * stride_n + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
        b_q = _to_unpacked_order(b_q, K_FORMAT, BM, PAD_D)
    return b_q


@triton.jit
def _attn_tile(b_q, acc, b_m, b_l, i_n, n, o_last, k, v, p_k, p_v, i_b, i_h, start, v_start, p_ks, p_bias, b_qs, bias_factor,
               k_stride_n, v_stride_n, D: tl.constexpr, PAD_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               K_FORMAT: tl.constexpr, PV_FP8: tl.constexpr, P_DTYPE: tl.constexpr, PER_TOKEN: tl.constexpr, BIAS: tl.constexpr,
               CAUSAL: tl.constexpr, VARLEN: tl.constexpr, K_TMA: tl.constexpr, V_TMA: tl.constexpr, MASKED: tl.constexpr,
               SUM_MMA: tl.constexpr, INTERPRET: tl.constexpr):
    """One key tile: scores, online softmax, P.V. MASKED tiles hide keys past n and, if causal, past every row's o_last."""
    EXACT: tl.constexpr = K_FORMAT == "exact"
    PACK: tl.constexpr = 2 if K_FORMAT == "int4" else 4 if K_FORMAT == "int2" else 1
    INT_MAX: tl.constexpr = not EXACT and K_FORMAT != "fp8" and not PER_TOKEN and not BIAS
    SHIFT: tl.constexpr = FP8_SHIFT if PV_FP8 else 0.0
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = tl.arange(0, PAD_D)

    # K [BN, PAD_D]
    if K_TMA:
        b_k = tl.reshape(k.load([i_b, i_h, start + i_n * BN, 0]), [BN, PAD_D // PACK])
    else:
        o_p = tl.arange(0, PAD_D // PACK)
        m_k = (o_p < D // PACK)[None, :]
        if MASKED:
            m_k = m_k & (o_n < n)[:, None]
        b_k = tl.load(p_k + o_n[:, None].to(tl.int64) * k_stride_n + o_p[None, :], mask=m_k, other=0.0)
    if PACK > 1:
        b_k = _unpack(b_k, K_FORMAT, BN, PAD_D, INTERPRET)
    if PER_TOKEN:
        b_ks = tl.load(p_ks + o_n, mask=o_n < n, other=0.0)
    elif not EXACT:
        b_ks = tl.load(p_ks + i_n * BN // SCALE_KEYS)

    # scores [BM, BN], row maxima in units of the base 2 softmax
    if EXACT and (INTERPRET or P_DTYPE == tl.float32):
        b_s = tl.dot(b_q.to(tl.float32), tl.trans(b_k).to(tl.float32), input_precision="tf32x3")
    else:
        b_s = tl.dot(b_q, tl.trans(b_k))
    if MASKED:
        m_s = (o_n < n)[None, :]
        if CAUSAL:
            m_s = m_s & (o_n[None, :] <= o_last[:, None])
    if INT_MAX:
        if MASKED:
            b_s = tl.where(m_s, b_s, MASKED_INT)
        b_max = tl.max(b_s, 1).to(tl.float32)
        b_s = b_s.to(tl.float32)
        b_factor = b_qs * b_ks
    else:
        b_s = b_s.to(tl.float32)
        b_factor = b_qs
        if PER_TOKEN:
            b_s = b_s * b_ks[None, :]
        elif not EXACT:
            b_factor = b_qs * b_ks
        if BIAS:
            b_bias = tl.load(p_bias + o_n, mask=o_n < n, other=0.0) * bias_factor
            b_s = b_s * b_factor[:, None] + b_bias[None, :]
        if MASKED:
            b_s = tl.where(m_s, b_s, NEVER)
        b_max = tl.max(b_s, 1)
    if BIAS:
        b_m_new = tl.maximum(b_m, b_max - SHIFT)
        b_p = tl.exp2(b_s - b_m_new[:, None])
    else:
        b_m_new = tl.maximum(b_m, b_max * b_factor - SHIFT)
        b_p = tl.exp2(b_s * b_factor[:, None] - b_m_new[:, None])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_alpha = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_alpha[:, None]
    if not SUM_MMA:
        b_l += tl.sum(tl.sum(tl.reshape(b_p, [BM, BN // 8, 4, 2]), 3), 1)
    acc = acc * b_alpha[:, None]

    if PV_FP8:
        # V [PAD_D, BN], keys permuted within 16; P alike, then added in float32 (FP8 MMA accumulates in about 14 bits)
        if V_TMA:
            b_v = tl.reshape(v.load([i_b, i_h, 0, v_start + i_n * BN]), [PAD_D, BN])
        else:
            b_v = tl.load(p_v + o_d[:, None].to(tl.int64) * v_stride_n + o_n[None, :], mask=(o_d < D)[:, None], other=0.0)
        if SUM_MMA:
            b_l = tl.dot(b_p.to(tl.float16), tl.full([BN, SUM_COLUMNS], 1.0, tl.float16), b_l)
        b_p = to_fp8(b_p, INTERPRET)
        b_p = tl.reshape(tl.permute(tl.reshape(b_p, [BM, BN // 16, 2, 4, 2]), (0, 1, 3, 2, 4)), [BM, BN])
        acc = acc + tl.dot(b_p, tl.trans(b_v))
    else:
        # V [BN, PAD_D]
        if V_TMA:
            b_v = tl.reshape(v.load([i_b, i_h, start + i_n * BN, 0]), [BN, PAD_D])
            if MASKED and VARLEN:
                b_v = tl.where((o_n < n)[:, None], b_v, 0.0)
        else:
            m_v = (o_d < D)[None, :]
            if MASKED:
                m_v = m_v & (o_n < n)[:, None]
            b_v = tl.load(p_v + o_n[:, None].to(tl.int64) * v_stride_n + o_d[None, :], mask=m_v, other=0.0)
        b_p = b_p.to(P_DTYPE)
        b_v = b_v.to(P_DTYPE)
        b_ones = tl.full([BN, SUM_COLUMNS], 1.0, tl.float32).to(P_DTYPE)
        if INTERPRET:
            b_p, b_v, b_ones = b_p.to(tl.float32), b_v.to(tl.float32), b_ones.to(tl.float32)
        if SUM_MMA:
            b_l = tl.dot(b_p, b_ones, b_l)
        acc = tl.dot(b_p, b_v, acc, input_precision="tf32x3")
    return acc, b_m_new, b_l


@triton.jit
def _tile_of(i_n, p_list, BN: tl.constexpr, QUERY_TILE: tl.constexpr):
    """The tile of BN keys that comes as number i_n."""
    if QUERY_TILE:
        i_listed = i_n * BN // SCALE_KEYS
        i_n += (tl.load(p_list + i_listed) - i_listed) * (SCALE_KEYS // BN)
    return i_n


@triton.jit
def _join_part(b_out, b_log, p_part, p_part_lse, m_m, m_d):
    """b_out and its log-sum-exp (base 2), joined with those of the key tiles that are not listed, if there are any."""
    b_part_log = tl.load(p_part_lse, mask=m_m, other=float("-inf"))
    m_part = b_part_log > float("-inf")
    b_top = tl.maximum(b_log, b_part_log)
    b_weight, b_part_weight = tl.exp2(b_log - b_top), tl.exp2(b_part_log - b_top)
    b_total = b_weight + b_part_weight
    b_part = tl.load(p_part, mask=m_part[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_out = b_out * (b_weight / b_total)[:, None] + b_part * (b_part_weight / b_total)[:, None]
    return b_out, b_top + tl.log2(b_total)


@triton.jit(do_not_specialize=["Hq", "Nq", "Nk", "qs_stride_b", "qs_stride_h", "ks_stride_b", "ks_stride_h",
                               "bias_stride_b", "bias_stride_h", "lse_stride_b", "lse_stride_h"])
def attn_fwd_kernel(q, k, v, out, lse, q_scale, k_scale, v_scale, bias, lse_shift, cu_q, cu_k,
                    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
                    out_stride_b, out_stride_h, out_stride_n, qs_stride_b, qs_stride_h, ks_stride_b, ks_stride_h,
                    bias_stride_b, lse_stride_b, bias_stride_h, lse_stride_h,
                    sm_factor, bias_factor, Hq, Nq, Nk, listed, count, part_lse, GROUP: tl.constexpr, D: tl.constexpr,
                    PAD_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q_FORMAT: tl.constexpr, K_FORMAT: tl.constexpr,
                    PV_FP8: tl.constexpr, P_DTYPE: tl.constexpr, PER_TOKEN: tl.constexpr, BIAS: tl.constexpr,
                    CAUSAL: tl.constexpr, LSE: tl.constexpr, SHIFTED: tl.constexpr, VARLEN: tl.constexpr,
                    K_TMA: tl.constexpr, V_TMA: tl.constexpr, SUM_MMA: tl.constexpr, INTERPRET: tl.constexpr,
                    QUERY_TILE: tl.constexpr):
    """One tile of BM query rows of one head against all its keys. k and v are descriptors where K_TMA and V_TMA say so.

    QUERY_TILE (0: none): rows that share a list of key tiles, of SCALE_KEYS keys each, ascending; the last is among them.
    """
    EXACT: tl.constexpr = K_FORMAT == "exact"
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if CAUSAL:
        # the longest rows first, so that the last programs to start are short
        i_m = tl.num_programs(0) - 1 - i_m
    i_hk = i_h // GROUP
    q_start, k_start, v_start, nq, nk = 0, 0, 0, Nq, Nk
    k_block, k_first = 0, 0
    if VARLEN:
        q_start = tl.load(cu_q + i_b)
        k_start = tl.load(cu_k + i_b)
        nq = tl.load(cu_q + i_b + 1) - q_start
        nk = tl.load(cu_k + i_b + 1) - k_start
        k_block = k_start // SCALE_KEYS + i_b
        v_start = k_block * SCALE_KEYS
        k_first = k_start.to(tl.int64)
        if i_m * BM >= nq:
            return
    i_b64, i_h64, i_hk64 = i_b.to(tl.int64), i_h.to(tl.int64), i_hk.to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < nq
    o_row = (q_start + o_m).to(tl.int64)
    o_last = o_m + (nk - nq)

    p_q = q + i_b64 * q_stride_b + i_h64 * q_stride_h
    b_q = _load_q(p_q, o_row, m_m, q_stride_n, Q_FORMAT, K_FORMAT, D, PAD_D, BM, INTERPRET)
    b_qs = tl.full([BM], sm_factor, tl.float32)
    p_ks = k_scale
    if not EXACT:
        p_qs = q_scale + i_b64 * qs_stride_b + i_h64 * qs_stride_h
        p_ks = k_scale + i_b64 * ks_stride_b + i_hk64 * ks_stride_h
        b_qs *= tl.load(p_qs + o_row, mask=m_m, other=0.0)
        if PER_TOKEN:
            p_ks += k_start
        else:
            p_ks += k_block
    p_bias = bias
    if BIAS:
        p_bias = bias + i_b64 * bias_stride_b + i_h64 * bias_stride_h + k_start
    p_k, p_v = k, v
    if not K_TMA:
        p_k = k + i_b64 * k_stride_b + i_hk64 * k_stride_h + k_first * k_stride_n
    if not V_TMA:
        if PV_FP8:
            p_v = v + i_b64 * v_stride_b + i_hk64 * v_stride_h + v_start
        else:
            p_v = v + i_b64 * v_stride_b + i_hk64 * v_stride_h + k_first * v_stride_n
    i_bd = i_b
    if VARLEN:
        i_bd = 0

    full, tiles = nk // BN, tl.cdiv(nk, BN)
    if CAUSAL:
        # the first row of the tile sees keys up to i_m * BM + nk - nq, its last row the most
        full = tl.minimum(full, tl.maximum(i_m * BM + nk - nq + 1, 0) // BN)
        tiles = tl.minimum(tiles, tl.cdiv(tl.maximum(i_m * BM + BM + nk - nq, 0), BN))
    p_list = listed
    if QUERY_TILE:
        i_list = (i_b64 * Hq + i_h64) * tl.cdiv(Nq, QUERY_TILE) + i_m * BM // QUERY_TILE
        p_list += i_list * tl.cdiv(Nk, SCALE_KEYS)
        tiles = tl.load(count + i_list) * (SCALE_KEYS // BN)
        full = tiles
        if Nk % SCALE_KEYS:
            full = tiles - SCALE_KEYS // BN
    b_m = tl.full([BM], NEVER, tl.float32)
    # row sums: one partial sum per lane that holds a part of the row, or equal columns of a product with ones
    b_l = tl.zeros([BM, SUM_COLUMNS if SUM_MMA else 4], tl.float32)
    acc = tl.zeros([BM, PAD_D], tl.float32)
    for i_n in tl.range(0, full):
        i_t = _tile_of(i_n, p_list, BN, QUERY_TILE)
        acc, b_m, b_l = _attn_tile(b_q, acc, b_m, b_l, i_t, nk, o_last, k, v, p_k, p_v, i_bd, i_hk, k_start, v_start,
                                   p_ks, p_bias, b_qs, bias_factor, k_stride_n, v_stride_n, D, PAD_D, BM, BN, K_FORMAT, PV_FP8,
                                   P_DTYPE, PER_TOKEN, BIAS, CAUSAL, VARLEN, K_TMA, V_TMA, False, SUM_MMA, INTERPRET)
    for i_n in tl.range(full, tiles, num_stages=1):
        i_t = _tile_of(i_n, p_list, BN, QUERY_TILE)
        acc, b_m, b_l = _attn_tile(b_q, acc, b_m, b_l, i_t, nk, o_last, k, v, p_k, p_v, i_bd, i_hk, k_start, v_start,
                                   p_ks, p_bias, b_qs, bias_factor, k_stride_n, v_stride_n, D, PAD_D, BM, BN, K_FORMAT, PV_FP8,
                                   P_DTYPE, PER_TOKEN, BIAS, CAUSAL, VARLEN, K_TMA, V_TMA, True, SUM_MMA, INTERPRET)

    if SUM_MMA:
        b_sum = tl.max(b_l, 1)
    else:
        b_sum = tl.sum(b_l, 1)
    b_inv = 1.0 / tl.where(b_sum > 0.0, b_sum, 1.0)
    b_out = acc * b_inv[:, None]
    o_d = tl.arange(0, PAD_D)
    m_d = o_d < D
    if PV_FP8:
        i_vs = i_b * (Hq // GROUP) + i_hk
        b_out *= tl.load(v_scale + i_vs.to(tl.int64) * D + o_d, mask=m_d, other=0.0)[None, :]
    p_out = out + i_b64 * out_stride_b + i_h64 * out_stride_h + o_row[:, None] * out_stride_n + o_d[None, :]
    if QUERY_TILE:
        b_out, b_log = _join_part(b_out, b_m + tl.log2(b_sum), p_out, part_lse + (i_b64 * Hq + i_h64) * Nq + o_m, m_m, m_d)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    if LSE:
        if QUERY_TILE:
            b_lse = b_log * LN2
        else:
            b_lse = tl.where(b_sum > 0.0, (b_m + tl.log2(b_sum)) * LN2, float("-inf"))
        p_row = i_b64 * lse_stride_b + i_h64 * lse_stride_h + o_row
        if SHIFTED:
            b_lse += tl.load(lse_shift + p_row, mask=m_m, other=0.0)
        tl.store(lse + p_row, b_lse, mask=m_m)


def _descriptor(x: Operand, shape: tuple[int, ...], block: tuple[int, int]) -> TensorDescriptor | None:
    """A TMA descriptor of x as [B, H, rows, columns], or None if its base or strides are not multiples of 16 bytes."""
    size = x.buffer.dtype.itemsize
    # the stride of a dimension of one element is never used, and may be anything
    strides = tuple(s if n > 1 else ceil_div(shape[-1] * size, 16) * 16 // size for n, s in zip(shape, x.strides))
    if x.buffer.data_ptr() % 16 or any(s * size % 16 for s in strides):
        return None
    return TensorDescriptor(x.buffer, list(shape), [*strides, 1], [1, 1, *block])


def launch_attn_fwd(q: Operand, k: Operand, v: Operand, out: Operand, *, sm_scale: float, is_causal: bool = False,
                    packed: Packed | None = None, bias: Buffer | None = None, lse: Buffer | None = None,
                    lse_shift: Buffer | None = None, pv_dtype: str | None = None, arch: tuple[int, int] = (9, 0),
                    config: TileConfig | None = None, listed: Listed | None = None) -> None:
    """out = softmax(q k^T sm_scale) v, from codes and scales as the quantisers left them, or exact.

    q, k: codes of `operands.codes_of`; for exact attention ("fp16", "bf16", "fp32") any view. v: any 16-bit (or fp32) view, or
    the codes of `operands.v_codes_of`.
    pv_dtype: "float16" or "bfloat16", what P (and a float32 V) is rounded to; by default V's own dtype. Exact attention in
    float32 (pv_dtype "float32") multiplies by TF32 in three terms.
    out: any dtype. lse [B, Hq, Nq] float32, natural log, plus lse_shift if that is given.
    bias [B, Hq, Nkv]: Q smoothing's correction. is_causal: key j is visible to query i if j <= i + Nkv - Nq; a row without
    a key gives 0 and -inf. packed: of operands of shape (S, H, T, D). arch decides on TMA and the tile; config overrides
    the tuning table. listed: the key tiles that each tile of queries takes, not causal, not packed; out then holds attention
    over the others, and is joined with it.
    """
    batch, q_heads, q_len, head_dim = q.shape
    _, kv_heads, kv_len, _ = k.shape
    exact = k.format in EXACT_FORMATS
    pv_fp8 = v.format == "fp8"
    per_token = k.block is None and not exact
    if config is None:
        config = lookup(family(q.format, k.format, v.format), arch, head_dim)
    lists: tuple[Any, ...] = (None,) * 3
    if listed is not None:
        if is_causal or packed is not None:
            raise ValueError("lists of key tiles are not supported with is_causal or packed sequences")
        config = replace(config, block_m=gcd(config.block_m, listed.query_tile))
        lists = (listed.tiles, listed.count, listed.part_lse)
    pad_d = max(64, triton.next_power_of_2(head_dim))
    rows = batch if packed is None else 1  # size of the batch dimension in memory
    pack = 1 if exact else get_format(k.format).codes_per_byte
    if pv_fp8:
        v_shape = (rows, kv_heads, head_dim, v_tokens(kv_len, batch if packed else None))
        v_block, p_dtype = (pad_d, config.block_n), "float16"
    else:
        v_shape, v_block = (rows, kv_heads, kv_len, head_dim), (config.block_n, pad_d)
        p_dtype = pv_dtype or str(v.buffer.dtype)
        if p_dtype not in P_DTYPES or (p_dtype == "float32" and not exact):
            raise ValueError(f"P.V in {p_dtype} is not supported; pass pv_dtype='float16' or 'bfloat16'")
    k_desc = v_desc = None
    if (9, 0) <= tuple(arch) < (12, 0):  # sm_120's mma.sync reads registers: pointers cost it fewer of them
        k_desc = _descriptor(k, (rows, kv_heads, kv_len, head_dim // pack), (config.block_n, pad_d // pack))
        v_desc = _descriptor(v, v_shape, v_block)
    sm_factor = sm_scale * LOG2_E
    launch(
        attn_fwd_kernel, (ceil_div(packed.q.longest if packed else q_len, config.block_m), q_heads, batch),
        q.buffer, k_desc or k.buffer, v_desc or v.buffer, out.buffer, lse, q.scale, k.scale, v.scale, bias, lse_shift,
        packed.q.cu if packed else None, packed.k.cu if packed else None,
        *q.strides, *k.strides, *v.strides, *out.strides, *row_strides(q_heads, q_len, packed is not None),
        *row_strides(kv_heads, scale_count(kv_len, k.block, batch if packed else None), packed is not None),
        0 if packed else q_heads * kv_len, 0 if packed else q_heads * q_len, kv_len, q_len,
        sm_factor if exact else sm_factor * (DECODE_FACTOR[q.format] * DECODE_FACTOR[k.format]), sm_factor, q_heads, q_len,
        kv_len, *lists, GROUP=q_heads // kv_heads, D=head_dim, PAD_D=pad_d, BM=config.block_m, BN=config.block_n,
        Q_FORMAT="exact" if exact else q.format, K_FORMAT="exact" if exact else k.format, PV_FP8=pv_fp8,
        P_DTYPE=P_DTYPES[p_dtype], PER_TOKEN=per_token, BIAS=bias is not None, CAUSAL=is_causal, LSE=lse is not None,
        SHIFTED=lse_shift is not None, VARLEN=packed is not None, K_TMA=k_desc is not None, V_TMA=v_desc is not None,
        SUM_MMA=config.sum_mma, INTERPRET=bool(triton.knobs.runtime.interpret),
        QUERY_TILE=0 if listed is None else listed.query_tile, num_warps=config.num_warps, num_stages=config.num_stages,
        maxnreg=config.max_registers)
