"""Attention over the key tiles that are not listed, each as one key: a short pass, whose result the attention kernel joins."""
from __future__ import annotations

from ..buffers import Buffer
from ..formats import LOG2_E, MIN_SCORE
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand
from ..quant.shapes import ceil_div
from .tiles import KEY_TILE, query_tile

NEVER = tl.constexpr(MIN_SCORE)
BUILD = (64, 64, 4, 2)
"""Query rows of a program, pooled keys that are read at once, warps, stages."""
ROW_BYTES = 256
"""Of a row up to which BUILD fits 99 KiB of shared memory; tiles of longer ones are smaller by as much."""


@triton.jit(do_not_specialize=["Hq", "Nq", "tiles"])
def pooled_part_kernel(q, keys, values, bias, out, part_lse, stride_b, stride_h, stride_n, out_stride_b, out_stride_h,
                       out_stride_n, factor, Hq, Nq, tiles, GROUP: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr,
                       ROWS: tl.constexpr, KEYS: tl.constexpr, QUERY_TILE: tl.constexpr, STAGES: tl.constexpr,
                       INTERPRET: tl.constexpr):
    """ROWS query rows of one head against its pooled keys; bias: -inf for a key that does not count."""
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_bh = i_b.to(tl.int64) * Hq + i_h
    o_m, o_d = i_m * ROWS + tl.arange(0, ROWS), tl.arange(0, PAD_D)
    m_m, m_d = o_m < Nq, (o_d < D)[None, :]
    p_q = q + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    b_q = tl.load(p_q + o_m.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m_m[:, None] & m_d, other=0.0)
    o_kv = (i_b.to(tl.int64) * (Hq // GROUP) + i_h // GROUP) * tiles * D
    # rows of one query tile, or of two that follow each other
    i_first, i_last = i_m * ROWS // QUERY_TILE, (tl.minimum(i_m * ROWS + ROWS, Nq) - 1) // QUERY_TILE
    TWO: tl.constexpr = QUERY_TILE % ROWS != 0
    m_first = (o_m // QUERY_TILE == i_first)[:, None]
    p_bias = bias + (i_bh * tl.cdiv(Nq, QUERY_TILE) + i_first) * tiles
    b_m = tl.full([ROWS], NEVER, tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PAD_D], tl.float32)
    for i_k in tl.range(0, tiles, KEYS, num_stages=STAGES):
        o_k = i_k + tl.arange(0, KEYS)
        m_k = (o_k < tiles)[:, None] & m_d
        b_k = tl.load(keys + o_kv + o_k[:, None] * D + o_d[None, :], mask=m_k, other=0.0)
        b_v = tl.load(values + o_kv + o_k[:, None] * D + o_d[None, :], mask=m_k, other=0.0)
        b_bias = tl.load(p_bias + o_k, mask=o_k < tiles, other=float("-inf"))
        if INTERPRET:  # its products of bfloat16 are wrong
            b_s = tl.dot(b_q.to(tl.float32), tl.trans(b_k).to(tl.float32))
        else:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
        if TWO:
            b_next = tl.load(p_bias + (i_last - i_first) * tiles + o_k, mask=o_k < tiles, other=float("-inf"))
            b_s = b_s * factor + tl.where(m_first, b_bias[None, :], b_next[None, :])
        else:
            b_s = b_s * factor + b_bias[None, :]
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_alpha = tl.exp2(b_m - b_new)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        acc = acc * b_alpha[:, None]
        if INTERPRET:
            acc += tl.dot(b_p, b_v.to(tl.float32))
        else:
            acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="tf32x3")
        b_m = b_new
    o_part = i_bh * Nq + o_m
    b_out = acc / tl.where(b_l > 0.0, b_l, 1.0)[:, None]
    p_out = out + i_b.to(tl.int64) * out_stride_b + i_h.to(tl.int64) * out_stride_h + o_m.to(tl.int64)[:, None] * out_stride_n
    tl.store(p_out + o_d[None, :], b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_d)
    tl.store(part_lse + o_part, tl.where(b_l > 0.0, b_m + tl.log2(b_l), float("-inf")), mask=m_m)


def launch_pooled_part(q: Operand, out: Operand, *, keys: Buffer, values: Buffer, bias: Buffer, part_lse: Buffer,
                       kv_shape: tuple[int, int, int, int], sm_scale: float, how: tuple[int, int, int, int] | None = None
                       ) -> None:
    """out [B, Hq, N, D] and part_lse [B, Hq, N] (base 2) of q [B, Hq, N, D] over pooled keys and values [B, Hkv, tiles, D].

    bias: float32 [B, Hq, query tiles, key tiles], added to base-2 scores; what is listed has -inf. Rows without a pooled key
    give zeros and -inf. part_lse is of keys as they are given: smoothed. how: rows, keys, warps, stages in place of the best.
    """
    batch, heads, tokens, head_dim = q.shape
    pad_d = max(16, triton.next_power_of_2(head_dim))
    rows, step, warps, stages = how or BUILD
    if how is None:
        less = max(1, pad_d * q.buffer.dtype.itemsize // ROW_BYTES)
        rows, step = rows // less, step // less
    launch(pooled_part_kernel, (ceil_div(tokens, rows), heads, batch), q.buffer, keys, values, bias, out.buffer, part_lse,
           *q.strides, *out.strides, float(sm_scale * LOG2_E), heads, tokens, ceil_div(kv_shape[2], KEY_TILE),
           GROUP=heads // kv_shape[1], D=head_dim, PAD_D=pad_d, ROWS=rows, KEYS=step,
           QUERY_TILE=query_tile(head_dim), STAGES=stages, INTERPRET=bool(triton.knobs.runtime.interpret), num_warps=warps)
