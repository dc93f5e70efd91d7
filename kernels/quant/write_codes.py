"""Device functions: rows to codes and scales in memory, for every kernel that quantises Q or K.

Rounding is to the nearest, half to even (int4 and int2 are mid-rise: the cell a value falls in).
"""
from __future__ import annotations

from ..formats import INT2_STEP, MIN_MAGNITUDE
from ..fp8 import to_fp8
from ..language import tl, triton

TINY = tl.constexpr(MIN_MAGNITUDE)
STEP_2 = tl.constexpr(INT2_STEP)
ROUND_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding it rounds a small float32 half to even and leaves the integer in the low bits."""


@triton.jit
def _cells(x, inverse, LEAST: tl.constexpr, MOST: tl.constexpr, INTERPRET: tl.constexpr):
    """floor(x * inverse) clamped to LEAST..MOST in the low bits of an int32, without the slow float to integer conversions."""
    if INTERPRET:
        b_sum = tl.floor(x * inverse) + ROUND_MAGIC
    else:  # rounded towards minus infinity
        b_sum = tl.inline_asm_elementwise("fma.rm.f32 $0, $1, $2, 0f4B400000;", "=f,f,f", [x, inverse], dtype=tl.float32,
                                          is_pure=True, pack=1)
    b_sum = tl.minimum(tl.maximum(b_sum, ROUND_MAGIC + LEAST), ROUND_MAGIC + MOST)
    return b_sum.to(tl.int32, bitcast=True)


@triton.jit
def write_codes(b_x, p_codes, p_scale, o_row, m_n, i_scale, rows, MAX_CODE: tl.constexpr, D: tl.constexpr, PAD_D: tl.constexpr,
                ROWS: tl.constexpr, FORMAT: tl.constexpr, PER_TOKEN: tl.constexpr, INTERPRET: tl.constexpr):
    """Scale and codes of float32 rows [ROWS, PAD_D] of one head, zero from channel D on and, of a block, where m_n is not set.

    o_row: int64, where the rows stand in codes and, if each has a scale, in scales. i_scale: where their one scale stands
    otherwise; rows: how many of them there are.
    """
    if FORMAT == "int2":
        b_mag = tl.sum(b_x * b_x, 1)
        if PER_TOKEN:
            b_mag = tl.sqrt(b_mag / D)
        else:
            b_mag = tl.sqrt(tl.sum(b_mag, 0) / (rows * D).to(tl.float32))
        b_scale = tl.maximum(b_mag, TINY) * STEP_2
    else:
        b_mag = tl.max(tl.abs(b_x), 1)
        if not PER_TOKEN:
            b_mag = tl.max(b_mag, 0)
        b_scale = tl.maximum(b_mag, TINY) / MAX_CODE
    if PER_TOKEN:
        tl.store(p_scale + o_row, b_scale, mask=m_n)
        b_inverse = (1.0 / b_scale)[:, None]
    else:
        tl.store(p_scale + i_scale, b_scale)
        b_inverse = 1.0 / b_scale
    if FORMAT == "int8":
        b_codes = (b_x * b_inverse + ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
        o_d = tl.arange(0, PAD_D)
        tl.store(p_codes + o_row[:, None] * D + o_d[None, :], b_codes, mask=m_n[:, None] & (o_d < D)[None, :])
    elif FORMAT == "fp8":
        b_codes = to_fp8(tl.minimum(tl.maximum(b_x * b_inverse, -MAX_CODE), MAX_CODE), INTERPRET)
        o_d = tl.arange(0, PAD_D)
        tl.store(p_codes + o_row[:, None] * D + o_d[None, :], b_codes, mask=m_n[:, None] & (o_d < D)[None, :])
    elif FORMAT == "int4":
        b_cell = _cells(b_x, b_inverse * 0.5, -8.0, 7.0, INTERPRET) & 15
        b_low, b_high = tl.split(tl.reshape(b_cell, [ROWS, PAD_D // 2, 2]))
        o_p = tl.arange(0, PAD_D // 2)
        tl.store(p_codes + o_row[:, None] * (D // 2) + o_p[None, :], (b_low | (b_high << 4)).to(tl.uint8),
                 mask=m_n[:, None] & (o_p < D // 2)[None, :])
    else:
        b_cell = _cells(b_x, b_inverse * 0.5, -2.0, 1.0, INTERPRET) & 3
        b_even, b_odd = tl.split(tl.reshape(b_cell, [ROWS, PAD_D // 4, 2, 2]))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        o_p = tl.arange(0, PAD_D // 4)
        b_byte = b_0 | (b_1 << 2) | (b_2 << 4) | (b_3 << 6)
        tl.store(p_codes + o_row[:, None] * (D // 4) + o_p[None, :], b_byte.to(tl.uint8),
                 mask=m_n[:, None] & (o_p < D // 4)[None, :])
