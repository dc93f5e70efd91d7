"""The softmax of one tile of scores, in base 2: maximum, probabilities in V's format, packed, and their sums."""
from __future__ import annotations

from ... import formats
from ..gluon_shim import gl, gluon, mbarrier
from .registers import ROWS, beside, constraints, fence_before, split_scores

P_SHIFT = gl.constexpr(formats.P_SHIFT)
LINE_SHIFT = gl.constexpr(formats.LINE_SHIFT)
LAZY_RISE = gl.constexpr(8.0)  # `lazy`: a row's maximum stays until it is short by more than a factor of 2**8


@gluon.jit
def softmax(s, scale, row_max, row_sums, mine, parity, build: gl.constexpr, FP8_PV: gl.constexpr, MASKED: gl.constexpr,
            TURN: gl.constexpr):
    """P of one tile, unpacked (line: packed), with the new row maximum and the factor for what was summed before.

    s: scores [ROWS, BN], int32 or float32; scale: [ROWS] (MASKED: 1.0), makes them base 2; row_max [ROWS]: running maximum
    minus the shift. TURN: the consumer's turn in the exponentials (barrier `mine`) is waited for once the maximum is known.
    """
    SHIFT: gl.constexpr = P_SHIFT if FP8_PV else 0.0
    new_max = gl.maximum(row_max, gl.max(s, 1).to(gl.float32) * scale - SHIFT)
    if build.lazy:
        new_max = gl.where(new_max - row_max > LAZY_RISE, new_max, row_max)
    if TURN:
        new_max = fence_before(new_max)
        mbarrier.wait(mine, parity)
    alpha = gl.exp2(row_max - new_max)
    s0, s1, s2, s3 = split_scores(s, build.block_n, FP8_PV)
    max_beside = beside(new_max, s0)
    if not MASKED:
        scale = beside(scale, s0)
    if build.line:
        if MASKED:
            scale = gl.full_like(max_beside, 1.0)
        p0 = _pack_line(s0, s1, s2, s3, scale, max_beside, build.block_n // 8, build.line)
        p1 = p0
        p2 = p0
        p3 = p0
    else:
        p0 = _exponentials(s0, scale, max_beside)
        p1 = _exponentials(s1, scale, max_beside)
        if FP8_PV:
            p2 = _exponentials(s2, scale, max_beside)
            p3 = _exponentials(s3, scale, max_beside)
            if not build.sum_mma:
                row_sums = _add_rows(row_sums, alpha, (p0 + p1) + (p2 + p3))
        else:
            p2 = p0
            p3 = p1
            if not build.sum_mma:
                row_sums = _add_rows(row_sums, alpha, p0 + p1)
    return p0, p1, p2, p3, alpha, new_max, row_sums


@gluon.jit
def _exponentials(s, scale, row_max):
    return gl.exp2(gl.fma(s.to(gl.float32), scale, -row_max))


@gluon.jit
def _add_rows(row_sums, alpha, p):
    """Partial row sums [ROWS, 4], one a thread: no shuffle in the loop."""
    sums = gl.convert_layout(gl.sum(p, 1), row_sums.type.layout, assert_trivial=True)
    return row_sums * gl.convert_layout(alpha, gl.SliceLayout(1, row_sums.type.layout), assert_trivial=True)[:, None] + sums


@gluon.jit
def mask(s, scale, i_n, o_row, q_len, kv_len, build: gl.constexpr):
    """Base-2 scores of a tile with the invisible ones at -inf."""
    S_LAYOUT: gl.constexpr = s.type.layout
    o_n = i_n * build.block_n + gl.arange(0, build.block_n, layout=gl.SliceLayout(0, S_LAYOUT))
    m_visible = (o_n < kv_len)[None, :]
    if build.causal:
        o_m = o_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT)) + (kv_len - q_len)
        m_visible = m_visible & (o_n[None, :] <= o_m[:, None])
    return gl.where(m_visible, s.to(gl.float32) * scale[:, None], float("-inf"))


@gluon.jit
def pack(p0, p1, p2, p3, V_TYPE: gl.constexpr):
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
def _pack_line(s0, s1, s2, s3, scale, row_max, COUNT: gl.constexpr, LINE: gl.constexpr):
    """P in FP8, packed as by `pack`, of the scores."""
    s0 = s0.to(gl.float32)
    scale, s0 = gl.broadcast(scale, s0)
    shift, s0 = gl.broadcast(-row_max, s0)
    line_shift, s0 = gl.broadcast(LINE_SHIFT - row_max, s0)
    return gl.inline_asm_elementwise(
        line_asm(COUNT, LINE), constraints("=&r", COUNT, "f", 7 * COUNT),
        [s0, s1.to(gl.float32), s2.to(gl.float32), s3.to(gl.float32), scale, shift, line_shift],
        dtype=gl.int32, is_pure=False, pack=COUNT)


@gluon.constexpr_function
def line_asm(count, line):
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
