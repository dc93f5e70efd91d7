"""Attention forward for Hopper (sm_90a) in Gluon: INT8 or FP8 QK^T, FP8 or 16-bit PV.

One producer warp feeds K and V tiles by TMA through a ring of stages; NC consumer warpgroups own 64 query rows each and share
every tile. A stage holds K of one tile and V of the tile before it, because a consumer issues QK^T of a tile together with PV
of the previous one: one barrier serves both. Tiles are visited from the last to the first, so that the tiles that need a mask
(the ragged end, the causal diagonal) come first and the long loop has none.

Softmax works in base 2. The row maximum is taken on the integer scores. PV in FP8: every tile's product is added in float32
registers (the tensor core keeps about 14 bits), P = e4m3(2 ** (s - m + 8)). At head dim 64, where the exponentials are the
bound, only 5 of 8 P are made so: of the other 3, the code is read off a straight line, round(8 (s - m + 8) + 55.55), for
e4m3's code is nearly its own logarithm. One such P is off by -8.1 to +6.8 % (RMS 3.2 %; e4m3's rounding: 5.9 %, 2.6 %), a row's
maximum and what is masked not at all; the output's relative L1 goes from 0.0402 to 0.0415. PV in 16 bits:
P = dtype_v(2 ** (s - m)), the accumulator lives in the tensor core's own float32; at head dim 64 m may stay short of the row
maximum by 8. FP8 row sums are sums of the rounded P.

Source: the two-level accumulation is that of SageAttention2 (arXiv 2411.10958, section 3.4); the producer and consumer
warpgroups are those of FlashAttention-3 (arXiv 2407.08608, section 3.1). The permuted V, which makes the registers of QK^T the
operand of PV, differs from both.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton

from ...buffers import Buffer, as_buffer
from ...formats import BLOCK_K as _BLOCK_K
from ...formats import LINE_SHIFT as _LINE_SHIFT
from ...formats import LOG2_E
from ...launch import launch
from ..gluon_shim import (
    TensorDescriptor,
    async_load,
    block_barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN_2 = gl.constexpr(0.6931471805599453)
M_INIT = gl.constexpr(-1.0e30)  # a running maximum of -inf would give NaN in exp2(m - m)
FP8_SHIFT = gl.constexpr(8.0)  # P is scaled by 2**8, just under e4m3's largest value 448
FP8_ONE = gl.constexpr(0x38)  # the bits of 1.0 in e4m3
LAZY_RISE = gl.constexpr(8.0)  # `lazy`: a row's maximum stays until it is short by more than a factor of 2**8
ROWS = gl.constexpr(64)  # query rows of a consumer warpgroup: the M of wgmma
BLOCK_K = gl.constexpr(_BLOCK_K)  # keys to a K scale
LINE_SHIFT = gl.constexpr(_LINE_SHIFT)


@gluon.jit
def _work_item(i_work, heads_q, heads_kv, q_len, kv_len, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Block of query rows, batch, head, kv head and number of kv tiles of one work item; causal: heavy blocks first."""
    n_m = gl.cdiv(q_len, BM)
    i_bh = i_work // n_m
    i_m = i_work % n_m
    n_kv = gl.cdiv(kv_len, BN)
    if CAUSAL:
        i_m = n_m - 1 - i_m
        visible = gl.minimum((i_m + 1) * BM, q_len) + kv_len - q_len
        n_kv = gl.cdiv(gl.minimum(gl.maximum(visible, 1), kv_len), BN)
    i_b = i_bh // heads_q
    i_h = i_bh % heads_q
    i_kv = i_b * heads_kv + i_h // (heads_q // heads_kv)
    return i_m, i_bh, i_b, i_h, i_kv, n_kv


@gluon.constexpr_function
def _p_layout(BN):
    """Register order of P before the FP8 conversion: that of the FP8 A operand."""
    registers, columns = [[0, 1], [0, 2], [8, 0]], 16
    while columns < BN:
        registers.append([0, columns])
        columns *= 2
    return gl.DistributedLinearLayout(registers, [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, BN])


@gluon.jit
def _split_scores(s, BN: gl.constexpr, FP8_PV: gl.constexpr):
    """[64, BN] -> the four (FP8) or two (16-bit) tensors that one packed register of P is made of; registers only."""
    if FP8_PV:
        r = s.reshape([64, BN // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))  # column 16 n + 8 h + 2 t + e
        a, b = r.split()  # e = 0, 1
        a0, a1 = a.split()  # h = 0, 1
        b0, b1 = b.split()
        return a0, b0, a1, b1  # each [64, BN // 16, 4]
    else:
        a, b = s.reshape([64, BN // 8, 4, 2]).split()
        return a, b, a, b  # each [64, BN // 8, 4]


@gluon.jit
def _beside(x, split):
    """[64] -> [64, 1, 1] in the layout of one of `_split_scores`'s tensors; moves no register."""
    return gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(2, split.type.layout)), assert_trivial=True)[:, None, None]


@gluon.jit
def _exponentials(f, scale, m):
    return gl.exp2(gl.fma(f.to(gl.float32), scale, -m))


@gluon.jit
def _softmax(s, scale, m, l, mine, parity, BN: gl.constexpr, FP8_PV: gl.constexpr, SUM_MMA: gl.constexpr,
             MASKED: gl.constexpr, TURN: gl.constexpr, LINE: gl.constexpr, LAZY: gl.constexpr):
    """P of one tile, unpacked (LINE: packed), with the new row maximum and the factor for what was summed before.

    s: scores [64, BN], int32 or float32; scale: [64] (MASKED: 1.0), makes them base 2; m [64]: running maximum minus the shift.
    TURN: the consumer's turn in the exponentials (barrier `mine`) is waited for once the maximum is known.
    """
    SHIFT: gl.constexpr = FP8_SHIFT if FP8_PV else 0.0
    m_new = gl.maximum(m, gl.max(s, 1).to(gl.float32) * scale - SHIFT)
    if LAZY:
        m_new = gl.where(m_new - m > LAZY_RISE, m_new, m)
    if TURN:
        m_new = _before(m_new)
        mbarrier.wait(mine, parity)
    alpha = gl.exp2(m - m_new)
    s0, s1, s2, s3 = _split_scores(s, BN, FP8_PV)
    m_row = _beside(m_new, s0)
    if not MASKED:
        scale = _beside(scale, s0)
    if LINE:
        if MASKED:
            scale = gl.full_like(m_row, 1.0)
        p0 = _pack_line(s0, s1, s2, s3, scale, m_row, BN // 8, LINE)
        p1 = p0
        p2 = p0
        p3 = p0
    else:
        p0 = _exponentials(s0, scale, m_row)
        p1 = _exponentials(s1, scale, m_row)
        if FP8_PV:
            p2 = _exponentials(s2, scale, m_row)
            p3 = _exponentials(s3, scale, m_row)
            if not SUM_MMA:
                l = _add_rows(l, alpha, (p0 + p1) + (p2 + p3))
        else:
            p2 = p0
            p3 = p1
            if not SUM_MMA:
                l = _add_rows(l, alpha, p0 + p1)
    return p0, p1, p2, p3, alpha, m_new, l


@gluon.jit
def _add_rows(l, alpha, p):
    """Partial row sums [64, 4], one a thread: no shuffle in the loop."""
    sums = gl.convert_layout(gl.sum(p, 1), l.type.layout, assert_trivial=True)
    return l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout), assert_trivial=True)[:, None] + sums


@gluon.jit
def _pack(p0, p1, p2, p3, V_TYPE: gl.constexpr):
    """P in V's format, packed into 32-bit registers: a loop that carries 8 or 16-bit values shuffles bytes."""
    if V_TYPE == gl.float8e4nv:
        return gl.inline_asm_elementwise(
            "{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b};}",
            "=r,f,f,f,f", [p0, p1, p2, p3], dtype=gl.int32, is_pure=False, pack=1)
    elif V_TYPE == gl.float16:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [p0, p1], dtype=gl.int32,
                                         is_pure=False, pack=1)
    else:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [p0, p1], dtype=gl.int32,
                                         is_pure=False, pack=1)


@gluon.jit
def _unpack(p, BN: gl.constexpr, V_TYPE: gl.constexpr, OUT: gl.constexpr, P_LAYOUT: gl.constexpr):
    """The packed P as the A operand of a product whose accumulator has layout OUT; moves no register."""
    if V_TYPE == gl.float8e4nv:
        b0 = p.to(gl.int8)
        b1 = (p >> 8).to(gl.int8)
        b2 = (p >> 16).to(gl.int8)
        b3 = (p >> 24).to(gl.int8)
        x = gl.join(gl.join(b0, b2), gl.join(b1, b3)).to(gl.float8e4nv, bitcast=True)  # [64, BN // 16, 4, h, e]
        x = gl.convert_layout(x.reshape([64, BN]), P_LAYOUT, assert_trivial=True)
        return gl.convert_layout(x, gl.DotOperandLayout(0, OUT, 4), assert_trivial=True)
    else:
        x = gl.join(p.to(gl.int16), (p >> 16).to(gl.int16)).to(V_TYPE, bitcast=True)  # [64, BN // 8, 4, e]
        return gl.convert_layout(x.reshape([64, BN]), gl.DotOperandLayout(0, OUT, 2), assert_trivial=True)


@gluon.jit
def _mask(s, scale, i_n, o_row, q_len, kv_len, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Base-2 scores of a tile with the invisible ones at -inf."""
    L: gl.constexpr = s.type.layout
    o_n = i_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, L))
    m_visible = (o_n < kv_len)[None, :]
    if CAUSAL:
        o_m = o_row + gl.arange(0, 64, layout=gl.SliceLayout(1, L)) + (kv_len - q_len)
        m_visible = m_visible & (o_n[None, :] <= o_m[:, None])
    return gl.where(m_visible, s.to(gl.float32) * scale[:, None], float("-inf"))


@gluon.jit
def _rescale(x, alpha):
    return x * gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _after(x):
    """x, behind a point that ptxas moves no wait and no arrival above: a store on the condition that a probability is huge."""
    return gl.inline_asm_elementwise(
        "{.reg .pred n; .reg .b32 a; mov.b32 a, 0; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; "
        "setp.gt.f32 n, $3, 0f7F000000; @n st.shared.b32 [a], a;}",
        "=f,=f,=f,=f,f,f,f,f", [x], dtype=gl.float32, is_pure=False, pack=4)


@gluon.jit
def _before(x):
    """x, a maximum and so never NaN, computed before what follows: behind a store on the condition that it is NaN."""
    return gl.inline_asm_elementwise(
        "{.reg .pred n; .reg .b32 a; mov.b32 a, 0; mov.b32 $0, $1; setp.nan.f32 n, $0, $0; @n st.shared.b32 [a], a;}",
        "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.constexpr_function
def _line_asm(count, line):
    """count registers of four e4m3 codes from 4 count scores, `line` of every eight registers without ex2.

    Beside the scores: count times the scale, minus the maximum, and the latter with LINE_SHIFT added. A code of e4m3 is its
    own logarithm, 8 x + 56 but for the mantissa: 2 ** f is taken for 1 + f, and below 2 ** -6 (codes under 8), where codes
    are no logarithms any more, for less than it is.
    """
    text = "{.reg .b16 a, b; .reg .b32 u, v, s, k; .reg .f32 e, f, g, h;"
    text += " mov.b32 s, 0x48004800; mov.b32 k, 0x64006400;"  # pairs of 8 and of 1024 in fp16
    for i in range(count):
        scale, shift = f"${5 * count + i}", f"${(7 if i % 8 < line else 6) * count + i}"
        text += "".join(f" fma.rn.f32 {r}, ${count * (1 + j) + i}, {scale}, {shift};" for j, r in enumerate("efgh"))
        if i % 8 < line:
            text += " cvt.rn.relu.f16x2.f32 u, f, e; cvt.rn.relu.f16x2.f32 v, h, g;"
            text += " fma.rn.f16x2 u, u, s, k; fma.rn.f16x2 v, v, s, k;"  # rounds: the code is in the low bits
            text += f" prmt.b32 ${i}, u, v, 0x6420;"
        else:
            text += "".join(f" ex2.approx.ftz.f32 {r}, {r};" for r in "efgh")
            text += " cvt.rn.satfinite.e4m3x2.f32 a, f, e; cvt.rn.satfinite.e4m3x2.f32 b, h, g;"
            text += f" mov.b32 ${i}, {{a, b}};"
    return text + "}"


@gluon.constexpr_function
def _register_constraints(count, floats):
    return ",".join(["=&r"] * count + ["f"] * floats if floats else ["=r"] * count + ["r"] * count)


@gluon.jit
def _pack_line(s0, s1, s2, s3, scale, m, COUNT: gl.constexpr, LINE: gl.constexpr):
    """P in FP8, packed as by `_pack`, of the scores."""
    s0 = s0.to(gl.float32)
    scale, s0 = gl.broadcast(scale, s0)
    shift, s0 = gl.broadcast(-m, s0)
    line_shift, s0 = gl.broadcast(LINE_SHIFT - m, s0)
    return gl.inline_asm_elementwise(
        _line_asm(COUNT, LINE), _register_constraints(COUNT, 7 * COUNT),
        [s0, s1.to(gl.float32), s2.to(gl.float32), s3.to(gl.float32), scale, shift, line_shift],
        dtype=gl.int32, is_pure=False, pack=COUNT)


@gluon.constexpr_function
def _held_asm(count, deep):
    """Passes `count` registers on, behind a store on the condition that one of the first `deep` has its sign bit set."""
    moves = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    ors = " ".join(f"or.b32 s, s, ${count + i};" for i in range(deep))
    store = "setp.lt.s32 n, s, 0; @n st.shared.b32 [a], a;"
    return f"{{.reg .pred n; .reg .b32 a, s; mov.b32 a, 0; mov.b32 s, 0; {ors} {store} {moves}}}"


@gluon.jit
def _held(p, COUNT: gl.constexpr, DEEP: gl.constexpr):
    """The packed P, of which a thread has COUNT registers, behind a point that ptxas moves no wait and no arrival above.

    No probability is negative, so that the store never happens; it depends on the exponentials of the first DEEP registers.
    """
    return gl.inline_asm_elementwise(_held_asm(COUNT, DEEP), _register_constraints(COUNT, 0), [p], dtype=gl.int32,
                                     is_pure=False, pack=COUNT)


@gluon.constexpr_function
def _skip_asm(count):
    """x times alpha for `count` elements, jumped over where alpha is 1 in the whole warp."""
    moves = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    tests = " ".join(f"setp.neu.or.f32 n, ${2 * count + i}, 0f3F800000, n;" for i in range(min(count, 4)))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (f"{{.reg .pred n; setp.ne.s32 n, 0, 0; {moves} {tests} vote.sync.any.pred n, n, -1; @!n bra.uni SAME; {products} "
            "SAME: }")


@gluon.constexpr_function
def _skip_constraints(count):
    return ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def _rescale_moved(x, alpha, COUNT: gl.constexpr):
    """`_rescale`, of which a thread has COUNT elements, that costs next to nothing while no maximum of the warp moves."""
    a = gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]
    a, x = gl.broadcast(a, x)
    return gl.inline_asm_elementwise(_skip_asm(COUNT), _skip_constraints(COUNT), [x, a], dtype=gl.float32, is_pure=False,
                                     pack=COUNT)


@gluon.jit
def _pv(p, v_t, ones_t, acc, zero_acc, zero_l, BN: gl.constexpr, V_TYPE: gl.constexpr, SUM_MMA: gl.constexpr,
        P_LAYOUT: gl.constexpr):
    """Issues PV (and the row sums); v_t [BN, D]. FP8: into a fresh accumulator; 16-bit: onto acc."""
    OL: gl.constexpr = acc.type.layout
    L8: gl.constexpr = zero_l.type.layout
    if V_TYPE == gl.float8e4nv:
        t = warpgroup_mma(_unpack(p, BN, V_TYPE, OL, P_LAYOUT), v_t, zero_acc, use_acc=False, is_async=True)
    else:
        t = warpgroup_mma(_unpack(p, BN, V_TYPE, OL, P_LAYOUT), v_t, acc, is_async=True)
    if SUM_MMA:
        tl = warpgroup_mma(_unpack(p, BN, V_TYPE, L8, P_LAYOUT), ones_t, zero_l, use_acc=False, is_async=True)
    else:
        tl = t
    return t, tl


@gluon.jit
def _pv_wait(t, tl, p, s, SUM_MMA: gl.constexpr):
    """Waits for PV and for the scores s. P's registers are read until here, so they are among what the wait gives back."""
    if SUM_MMA:
        return warpgroup_mma_wait(0, deps=(t, tl, p, s))
    else:
        t, p, s = warpgroup_mma_wait(0, deps=(t, p, s))
        return t, t, p, s


@gluon.jit
def _one_column(x):
    """A thread's two equal columns of the all-ones product as one: [64, 8] -> [64, 4]."""
    a, b = x.reshape([64, 4, 2]).split()
    return a


@gluon.jit
def _accumulate(acc, l, t, tl, alpha_old, alpha, FP8_PV: gl.constexpr, SUM_MMA: gl.constexpr, LAZY: gl.constexpr):
    """Adds a finished PV whose P was made under alpha_old; alpha is that of the tile after it."""
    if FP8_PV:
        acc = _rescale(acc, alpha_old) + t
    elif LAZY:
        acc = _rescale_moved(t, alpha, t.shape[1] // 2)
    else:
        acc = _rescale(t, alpha)
    if SUM_MMA:
        l = _rescale(l, alpha_old) + _one_column(tl)
    return acc, l


@gluon.jit
def _step(i_n, W: gl.constexpr, tiles, barriers, where, zeros, s, m, l, acc, p, alpha, k_scale, stage, phase, turn,
          BN: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr, SUM_MMA: gl.constexpr, TOKEN: gl.constexpr,
          PIN: gl.constexpr, HOLD: gl.constexpr, LINE: gl.constexpr, LAZY: gl.constexpr, FIRST: gl.constexpr,
          MASK: gl.constexpr, CAUSAL: gl.constexpr):
    """The softmax of tile i_n, with PV of the tile before it in flight; QK^T of this one is issued with it, and waited for.

    FIRST: there is no tile before, and s holds this one's scores already.
    """
    q_t, k_s, v_s, ones_t = tiles
    full, empty, token = barriers
    q_scale, p_k_scale, o_row, q_len, kv_len = where
    zero_s, zero_acc, zero_l = zeros
    V_TYPE: gl.constexpr = v_s.dtype
    P_LAYOUT: gl.constexpr = _p_layout(BN)
    FP8_PV: gl.constexpr = V_TYPE == gl.float8e4nv
    scale = q_scale * k_scale
    k_scale = gl.load(p_k_scale + gl.maximum(i_n - 1, 0) * BN // BLOCK_K)
    if not FIRST:
        mbarrier.wait(full.index(stage), phase)
        s_next = warpgroup_mma(q_t, k_s.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
        v_t = v_s.index(stage)
        if FP8_PV:
            v_t = v_t.permute((1, 0))
        t, tl = _pv(p, v_t, ones_t, acc, zero_acc, zero_l, BN, V_TYPE, SUM_MMA, P_LAYOUT)
        s = warpgroup_mma_wait(2 if SUM_MMA else 1, deps=(s_next,))
    x = s
    if MASK:
        x = _mask(s, scale, i_n, o_row, q_len, kv_len, BN, CAUSAL)
        scale = 1.0
    alpha_old = alpha
    mine = token.index(W)
    parity = (turn & 1) ^ (1 if W == 0 else 0)
    if TOKEN and not FIRST and not HOLD:  # one warpgroup at a time in the exponentials
        mbarrier.wait(mine, parity)
    p0, p1, p2, p3, alpha, m, l = _softmax(
        x, scale, m, l, mine, parity, BN, FP8_PV, SUM_MMA, MASK, TOKEN and HOLD > 0 and not FIRST, LINE, LAZY)
    if PIN:
        p3 = _after(p3)
    if HOLD:
        COUNT: gl.constexpr = BN // 8 if FP8_PV else BN // 4
        p_next = p0  # LINE
        if not LINE:
            p_next = _pack(p0, p1, p2, p3, V_TYPE)
        p_next = _held(p_next, COUNT, COUNT * HOLD // 8)
    if TOKEN and not FIRST:
        mbarrier.arrive(token.index((W + 1) % NC), count=1)
        turn += 1
    if not FIRST:
        t, tl, p, s = _pv_wait(t, tl, p, s, SUM_MMA)
        acc, l = _accumulate(acc, l, t, tl, alpha_old, alpha, FP8_PV, SUM_MMA, LAZY)
        mbarrier.arrive(empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if not HOLD:
        p_next = _pack(p0, p1, p2, p3, V_TYPE)
    return s, m, l, acc, p_next, alpha, k_scale, stage, phase, turn


@gluon.jit
def _consumer(W: gl.constexpr, tiles, barriers, pointers, sizes, D: gl.constexpr, BN: gl.constexpr, NC: gl.constexpr,
              STAGES: gl.constexpr, CAUSAL: gl.constexpr, LSE: gl.constexpr, LSE_SHIFT: gl.constexpr, SUM_MMA: gl.constexpr,
              TOKEN: gl.constexpr, PIN: gl.constexpr, HOLD: gl.constexpr, LINE: gl.constexpr, LAZY: gl.constexpr):
    q_s, k_s, v_s, ones_s = tiles
    q_full, q_empty, full, empty, token = barriers
    p_o, p_lse, p_shift, p_q_scale, p_k_scale, p_v_scale = pointers
    sm_scale, heads_q, heads_kv, q_len, kv_len, n_work, stride_ob, stride_oh, stride_on = sizes
    P_LAYOUT: gl.constexpr = _p_layout(BN)
    V_TYPE: gl.constexpr = v_s.dtype
    FP8_PV: gl.constexpr = V_TYPE == gl.float8e4nv
    BM: gl.constexpr = ROWS * NC
    S_TYPE: gl.constexpr = gl.int32 if q_s.dtype == gl.int8 else gl.float32
    SL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    OL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8_PV else 16])
    L8: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32 if FP8_PV else 16])
    OR: gl.constexpr = gl.SliceLayout(1, OL)
    OC: gl.constexpr = gl.SliceLayout(0, OL)
    zero_s = gl.zeros([64, BN], S_TYPE, layout=SL)
    zero_acc = gl.zeros([64, D], gl.float32, layout=OL)
    zero_l = gl.zeros([64, 8], gl.float32, layout=L8)
    q_t = q_s.index(W)
    ones_t = ones_s.permute((1, 0))
    step_tiles = (q_t, k_s, v_s, ones_t)
    step_barriers = (full, empty, token)
    zeros = (zero_s, zero_acc, zero_l)
    stage = 0
    phase = 0
    q_phase = 0
    turn = 0
    for i_work in range(gl.program_id(0), n_work, gl.num_programs(0)):
        i_m, i_bh, i_b, i_h, i_kv, n_kv = _work_item(i_work, heads_q, heads_kv, q_len, kv_len, BM, BN, CAUSAL)
        o_row = i_m * BM + W * ROWS
        o_q = o_row + gl.arange(0, 64, layout=gl.SliceLayout(1, SL))
        q_scale = gl.load(p_q_scale + i_bh.to(gl.int64) * q_len + o_q, mask=o_q < q_len, other=0.0) * sm_scale
        p_ks = p_k_scale + i_kv * gl.cdiv(kv_len, BLOCK_K)
        n_full = kv_len // BN  # tiles that need no mask
        if CAUSAL:
            n_full = gl.minimum(n_full, gl.maximum(o_row + kv_len - q_len + 1, 0) // BN)
        m = gl.full([64], M_INIT, gl.float32, layout=gl.SliceLayout(1, SL))
        acc = zero_acc
        where = (q_scale, p_ks, o_row, q_len, kv_len)
        if SUM_MMA:
            l = _one_column(zero_l)
        else:
            LQ: gl.constexpr = gl.SliceLayout(1, _split_scores(zero_s, BN, FP8_PV)[0].type.layout)
            l = gl.zeros([64, 4], gl.float32, layout=LQ)
        k_scale = gl.load(p_ks + (n_kv - 1) * BN // BLOCK_K)
        mbarrier.wait(q_full, q_phase)
        mbarrier.wait(full.index(stage), phase)
        s = warpgroup_mma(q_t, k_s.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        s, m, l, acc, p, alpha, k_scale, stage, phase, turn = _step(
            n_kv - 1, W, step_tiles, step_barriers, where, zeros, s, m, l, acc, None, m, k_scale, stage,
            phase, turn, BN, NC, STAGES, SUM_MMA, TOKEN, PIN, HOLD, LINE, LAZY, True, True, CAUSAL)
        n_full = gl.minimum(n_full, n_kv - 1)
        if CAUSAL:
            for j in range(n_kv - 1 - n_full):
                s, m, l, acc, p, alpha, k_scale, stage, phase, turn = _step(
                    n_kv - 2 - j, W, step_tiles, step_barriers, where, zeros, s, m, l, acc, p, alpha, k_scale, stage,
                    phase, turn, BN, NC, STAGES, SUM_MMA, TOKEN, PIN, HOLD, LINE, LAZY, False, True, CAUSAL)
        for j in range(n_full):
            s, m, l, acc, p, alpha, k_scale, stage, phase, turn = _step(
                n_full - 1 - j, W, step_tiles, step_barriers, where, zeros, s, m, l, acc, p, alpha, k_scale, stage,
                phase, turn, BN, NC, STAGES, SUM_MMA, TOKEN, PIN, HOLD, LINE, LAZY, False, False, CAUSAL)
        mbarrier.arrive(q_empty, count=1)
        mbarrier.wait(full.index(stage), phase)
        v_t = v_s.index(stage)
        if FP8_PV:
            v_t = v_t.permute((1, 0))
        t, tl = _pv(p, v_t, ones_t, acc, zero_acc, zero_l, BN, V_TYPE, SUM_MMA, P_LAYOUT)
        t, tl, p, s = _pv_wait(t, tl, p, s, SUM_MMA)
        mbarrier.arrive(empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        q_phase ^= 1
        if FP8_PV:
            acc = _rescale(acc, alpha) + t
        else:
            acc = t
        if SUM_MMA:
            l = _rescale(l, alpha) + _one_column(tl)
            row_sum = gl.convert_layout(gl.sum(l, 1) * 0.25, OR)
        else:
            row_sum = gl.convert_layout(gl.sum(l, 1), OR)
        m_seen = row_sum > 0.0
        o = acc * gl.where(m_seen, 1.0 / row_sum, 0.0)[:, None]
        o_d = gl.arange(0, D, layout=OC)
        if FP8_PV:
            o = o * gl.load(p_v_scale + i_kv * D + o_d)[None, :]
        o_m = o_row + gl.arange(0, 64, layout=OR)
        p_row = p_o + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh + o_m.to(gl.int64) * stride_on
        gl.store(p_row[:, None] + o_d[None, :], o.to(p_o.dtype.element_ty), mask=(o_m < q_len)[:, None])
        if LSE:
            o_lse = i_bh.to(gl.int64) * q_len + o_m
            lse = (gl.convert_layout(m, OR) + gl.log2(row_sum)) * LN_2
            if LSE_SHIFT:
                lse += gl.load(p_shift + o_lse, mask=o_m < q_len, other=0.0)
            gl.store(p_lse + o_lse, gl.where(m_seen, lse, float("-inf")), mask=o_m < q_len)


@gluon.jit
def _producer(q_desc, k_desc, v_desc, tiles, barriers, sizes, D: gl.constexpr, BN: gl.constexpr, NC: gl.constexpr,
              STAGES: gl.constexpr, CAUSAL: gl.constexpr):
    q_s, k_s, v_s, ones_s = tiles
    q_full, q_empty, full, empty, token = barriers
    sm_scale, heads_q, heads_kv, q_len, kv_len, n_work, stride_ob, stride_oh, stride_on = sizes
    FP8_PV: gl.constexpr = v_s.dtype == gl.float8e4nv
    K_BYTES: gl.constexpr = BN * D
    V_BYTES: gl.constexpr = BN * D * (1 if FP8_PV else 2)
    BM: gl.constexpr = ROWS * NC
    stage = 0
    phase = 1
    q_phase = 1
    for i_work in range(gl.program_id(0), n_work, gl.num_programs(0)):
        i_m, i_bh, i_b, i_h, i_kv, n_kv = _work_item(i_work, heads_q, heads_kv, q_len, kv_len, BM, BN, CAUSAL)
        i_kvh = i_h // (heads_q // heads_kv)
        mbarrier.wait(q_empty, q_phase)
        q_phase ^= 1
        mbarrier.expect(q_full, BM * D)
        for i in gl.static_range(NC):
            async_load(q_desc, [i_bh * q_len + i_m * BM + i * ROWS, 0], q_full, q_s.index(i))
        o_k = i_kv * kv_len
        for j in range(n_kv + 1):
            i_n = n_kv - 1 - j
            mbarrier.wait(empty.index(stage), phase)
            if j < n_kv:
                if j >= 1:
                    mbarrier.expect(full.index(stage), K_BYTES + V_BYTES)
                else:
                    mbarrier.expect(full.index(stage), K_BYTES)
                async_load(k_desc, [o_k + i_n * BN, 0], full.index(stage), k_s.index(stage))
            else:
                mbarrier.expect(full.index(stage), V_BYTES)
            if j >= 1:
                if FP8_PV:
                    async_load(v_desc, [i_kv * D, (i_n + 1) * BN], full.index(stage), v_s.index(stage))
                else:
                    V4: gl.constexpr = v_desc.layout
                    v_tile = v_s.index(stage)._reinterpret(v_s.dtype, [1, 1, BN, D], V4)
                    async_load(v_desc, [i_b, i_kvh, (i_n + 1) * BN, 0], full.index(stage), v_tile)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit(do_not_specialize=["heads_q", "heads_kv", "q_len", "kv_len", "n_work"])
def attn_fwd_kernel(q_desc, k_desc, v_desc, p_o, p_lse, p_shift, p_q_scale, p_k_scale, p_v_scale, sm_scale, heads_q,
                           heads_kv, q_len, kv_len, n_work, stride_ob, stride_oh, stride_on, D: gl.constexpr,
                           BN: gl.constexpr, NC: gl.constexpr, STAGES: gl.constexpr, CONSUMER_REGS: gl.constexpr,
                           CAUSAL: gl.constexpr, LSE: gl.constexpr, LSE_SHIFT: gl.constexpr, SUM_MMA: gl.constexpr,
                           TOKEN: gl.constexpr, PIN: gl.constexpr, HOLD: gl.constexpr, LINE: gl.constexpr,
                           LAZY: gl.constexpr, V_LAYOUT: gl.constexpr, ONES_LAYOUT: gl.constexpr):
    V_TYPE: gl.constexpr = v_desc.dtype
    FP8_PV: gl.constexpr = V_TYPE == gl.float8e4nv
    q_s = gl.allocate_shared_memory(q_desc.dtype, [NC, ROWS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    if FP8_PV:
        v_s = gl.allocate_shared_memory(V_TYPE, [STAGES, D, BN], V_LAYOUT)
    else:
        v_s = gl.allocate_shared_memory(V_TYPE, [STAGES, BN, D], V_LAYOUT)
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    if FP8_PV:  # by its bits: of a converted 1.0 in both halves of a register ptxas leaves one half unwritten
        ones = gl.full([8, BN], FP8_ONE, gl.int8, layout=BL).to(V_TYPE, bitcast=True)
    else:
        ones = gl.full([8, BN], 1.0, V_TYPE, layout=BL)
    ones_s = gl.allocate_shared_memory(V_TYPE, [8, BN], ONES_LAYOUT, ones)
    fence_async_shared()
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    token = gl.allocate_shared_memory(gl.int64, [NC, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=NC)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=NC)
    for i in gl.static_range(NC):
        mbarrier.init(token.index(i), count=1)
    block_barrier()
    tiles = (q_s, k_s, v_s, ones_s)
    barriers = (q_full, q_empty, full, empty, token)
    pointers = (p_o, p_lse, p_shift, p_q_scale, p_k_scale, p_v_scale)
    sizes = (sm_scale, heads_q, heads_kv, q_len, kv_len, n_work, stride_ob, stride_oh, stride_on)
    if NC == 2:
        gl.warp_specialize([
            (_consumer, (0, tiles, barriers, pointers, sizes, D, BN, NC, STAGES, CAUSAL, LSE, LSE_SHIFT, SUM_MMA, TOKEN, PIN,
                         HOLD, LINE, LAZY)),
            (_consumer, (1, tiles, barriers, pointers, sizes, D, BN, NC, STAGES, CAUSAL, LSE, LSE_SHIFT, SUM_MMA, TOKEN, PIN,
                         HOLD, LINE, LAZY)),
            (_producer, (q_desc, k_desc, v_desc, tiles, barriers, sizes, D, BN, NC, STAGES, CAUSAL)),
        ], [4, 1], [CONSUMER_REGS, 24])
    else:
        gl.warp_specialize([
            (_consumer, (0, tiles, barriers, pointers, sizes, D, BN, NC, STAGES, CAUSAL, LSE, LSE_SHIFT, SUM_MMA, TOKEN, PIN,
                         HOLD, LINE, LAZY)),
            (_consumer, (1, tiles, barriers, pointers, sizes, D, BN, NC, STAGES, CAUSAL, LSE, LSE_SHIFT, SUM_MMA, TOKEN, PIN,
                         HOLD, LINE, LAZY)),
            (_consumer, (2, tiles, barriers, pointers, sizes, D, BN, NC, STAGES, CAUSAL, LSE, LSE_SHIFT, SUM_MMA, TOKEN, PIN,
                         HOLD, LINE, LAZY)),
            (_producer, (q_desc, k_desc, v_desc, tiles, barriers, sizes, D, BN, NC, STAGES, CAUSAL)),
        ], [4, 4, 1], [CONSUMER_REGS, CONSUMER_REGS, 24])


@dataclass(frozen=True)
class HopperConfig:
    """How the kernel is built for one head dim and one V format.

    block_n: keys of a tile. consumers: warpgroups of 64 query rows. stages: K/V tiles in shared memory. registers: of a
    consumer's thread. sum_mma: row sums by an all-ones product instead of adds. token: consumers take turns in the
    exponentials. pin: waits stay behind a quarter of the exponentials. hold: behind so many eighths of them, packed, and a
    consumer waits for its turn with the row maximum in hand. line (FP8, with hold and sum_mma): so many eighths of P without
    an exponential, as codes of e4m3 are nearly logarithms. lazy (16 bits): a row's maximum, and with it what was summed,
    stays until it is short by 2**8. persistent: one program a multiprocessor.
    """

    block_n: int
    consumers: int
    stages: int
    registers: int
    sum_mma: bool = True
    token: bool = False
    pin: bool = False
    hold: int = 0
    line: int = 0
    lazy: bool = False
    persistent: bool = False

    def __post_init__(self) -> None:
        if self.line and not (self.hold and self.sum_mma):
            raise ValueError(f"line={self.line} needs hold and sum_mma, given hold={self.hold}, sum_mma={self.sum_mma}")


# (head dim, P.V in FP8) -> how to build, whatever Q and K are in. eval/speed/NOTES.md has what else was tried.
CONFIGS = {
    (64, True): HopperConfig(128, 3, 3, 160, token=True, hold=4, line=3),
    (128, True): HopperConfig(128, 2, 3, 240, pin=True),
    (64, False): HopperConfig(128, 3, 3, 160, sum_mma=False, lazy=True),
    (128, False): HopperConfig(128, 2, 3, 240, sum_mma=False),
}


def _swizzled(inner: int, bits: int, rank: int = 2) -> gl.NVMMASharedLayout:
    """Layout of a shared tile whose rows hold `inner` elements, as TMA writes and wgmma reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, inner * bits // 8), element_bitwidth=bits, rank=rank)


def _codes_descriptor(codes: Buffer, rows: int, columns: int, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(codes, [rows, columns], [columns, 1], list(block), _swizzled(block[1], 8))


def _v_descriptor(v: Buffer, shape: tuple[int, int, int, int], strides: tuple[int, int, int], block_n: int) -> TensorDescriptor:
    """The caller's own 16-bit V, by its strides; TMA fills rows past the end with zeros."""
    if v.data_ptr() % 16 or any(stride % 8 for stride, length in zip(strides, shape) if length > 1):
        raise ValueError(f"16-bit V at {v.data_ptr():#x} with strides {strides} (batch, head, token): the Hopper kernel "
                         "takes multiples of 16 bytes; pass a contiguous V or backend='triton'")
    # the stride of a dimension of one element is never used, and may be anything
    strides = [stride if length > 1 else shape[3] for stride, length in zip(strides, shape)]
    return TensorDescriptor(v, list(shape), [*strides, 1], [1, 1, block_n, shape[3]], _swizzled(shape[3], 16, rank=4))


@cache
def _multiprocessors(device: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def launch_arguments(q: Any, k: Any, v: Any, out: Any, *, q_shape: tuple[int, int, int, int],
                     kv_shape: tuple[int, int, int, int], q_format: str, pv_format: str,
                     out_strides: tuple[int, int, int], q_scale: Any, k_scale: Any,
                     sm_scale: float, v_strides: tuple[int, int, int] | None = None, v_scale: Any = None, lse: Any = None,
                     lse_shift: Any = None, is_causal: bool = False, config: HopperConfig | None = None
                     ) -> tuple[int, tuple, dict]:
    """Work items, positional arguments and constants of a launch; see `launch_attn_fwd`."""
    batch, q_heads, q_len, head_dim = q_shape
    _, kv_heads, kv_len, _ = kv_shape
    fp8_pv = pv_format == "fp8"
    config = config or CONFIGS[head_dim, fp8_pv]
    block_n = config.block_n
    storage = "float8_e4m3fn" if q_format == "fp8" else "int8"
    q_desc = _codes_descriptor(as_buffer(q, storage), batch * q_heads * q_len, head_dim, (ROWS.value, head_dim))
    k_desc = _codes_descriptor(as_buffer(k, storage), batch * kv_heads * kv_len, head_dim, (block_n, head_dim))
    if fp8_pv:
        padded = triton.cdiv(kv_len, _BLOCK_K) * _BLOCK_K
        v_desc = _codes_descriptor(as_buffer(v, "float8_e4m3fn"), batch * kv_heads * head_dim, padded, (head_dim, block_n))
        v_layout, ones_layout = _swizzled(block_n, 8), _swizzled(block_n, 8)
    else:
        v_desc = _v_descriptor(as_buffer(v), kv_shape, v_strides, block_n)
        v_layout, ones_layout = _swizzled(head_dim, 16), _swizzled(block_n, 16)
    n_work = triton.cdiv(q_len, ROWS.value * config.consumers) * batch * q_heads
    scales = as_buffer(q_scale)
    arguments = (q_desc, k_desc, v_desc, as_buffer(out), as_buffer(lse) or scales, as_buffer(lse_shift) or scales, scales,
                 as_buffer(k_scale), as_buffer(v_scale) or scales, float(sm_scale * LOG2_E), q_heads, kv_heads, q_len, kv_len,
                 n_work, *out_strides)
    constants = dict(D=head_dim, BN=block_n, NC=config.consumers, STAGES=config.stages, CONSUMER_REGS=config.registers,
                     CAUSAL=bool(is_causal), LSE=lse is not None, LSE_SHIFT=lse is not None and lse_shift is not None,
                     SUM_MMA=config.sum_mma, TOKEN=config.token, PIN=config.pin, HOLD=int(config.hold),
                     LINE=config.line, LAZY=config.lazy, V_LAYOUT=v_layout, ONES_LAYOUT=ones_layout, num_warps=4)
    return n_work, arguments, constants


def launch_attn_fwd(q: Any, k: Any, v: Any, out: Any, *, q_shape: tuple[int, int, int, int],
                    kv_shape: tuple[int, int, int, int], q_format: str, k_format: str, pv_format: str,
                    granularity: str = "block", out_strides: tuple[int, int, int],
                    v_strides: tuple[int, int, int] | None = None, q_scale: Any = None, k_scale: Any = None,
                    v_scale: Any = None, bias: Any = None, lse: Any = None, lse_shift: Any = None, sm_scale: float,
                    is_causal: bool = False, pv_dtype: str | None = None, arch: tuple[int, int] = (9, 0),
                    config: HopperConfig | None = None) -> None:
    """out = softmax(q k^T sm_scale) v on sm_90, from codes and scales as the quantisers left them.

    The arguments are those of the portable `launch_attn_fwd`. q_shape (B, Hq, Nq, D) and kv_shape (B, Hkv, Nkv, D), D 64 or
    128; strides are (batch, head, seq) in elements. q, k: contiguous HND codes, both "int8" or both "fp8"; q_scale
    [B, Hq, Nq], k_scale [B, Hkv, ceil(Nkv / 128)]. v: for pv_format "fp16" the caller's float16 or bfloat16 view by
    v_strides, for "fp8" the codes of `launch_quant_v` with v_scale [B, Hkv, D]. out: any float dtype, by out_strides. lse
    [B, Hq, Nq] float32, natural log, plus lse_shift if that is given. is_causal: key j is visible to query i if
    j <= i + Nkv - Nq; a row without a key gives 0 and -inf.
    sm_scale: not negative (the row maximum is taken before it is multiplied).
    Raises ValueError for what the kernel does not cover.
    """
    supported = {"q/k formats": ((q_format, k_format), (("int8", "int8"), ("fp8", "fp8"))),
                 "P.V format": (pv_format, ("fp16", "fp8")), "granularity": (granularity, ("block",)),
                 "head dim": (q_shape[3], (64, 128)), "arch": (tuple(arch), ((9, 0),))}
    for name, (given, known) in supported.items():
        if given not in known:
            raise ValueError(f"{name} {given} is not supported by the Hopper kernel (it has {known}); use backend='triton'")
    if bias is not None:
        raise ValueError("a score bias (smooth_q) is not supported by the Hopper kernel; use backend='triton'")
    if sm_scale < 0:
        raise ValueError(f"sm_scale {sm_scale} is negative; negate q and the scale")
    n_work, arguments, constants = launch_arguments(
        q, k, v, out, q_shape=q_shape, kv_shape=kv_shape, q_format=q_format, pv_format=pv_format, out_strides=out_strides,
        q_scale=q_scale, k_scale=k_scale, sm_scale=sm_scale, v_strides=v_strides, v_scale=v_scale, lse=lse, lse_shift=lse_shift,
        is_causal=is_causal, config=config)
    config = config or CONFIGS[q_shape[3], pv_format == "fp8"]
    programs = n_work
    if config.persistent:
        programs = min(n_work, _multiprocessors(triton.runtime.driver.active.get_current_device()))
    launch(attn_fwd_kernel, (programs,), *arguments, **constants)
