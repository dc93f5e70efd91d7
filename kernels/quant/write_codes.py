"""Device function: rows to codes and scales in memory, as `quant_qk_kernel` makes them.

For the kernels that do more to a row first. `quant_qk_kernel` has the same in its own text, whose builds are shipped.
"""
from __future__ import annotations

from ..fp8 import to_fp8
from ..language import tl, triton
from .quant_qk import ROUND_MAGIC, STEP_2, TINY, _cells


@triton.jit
def write_codes(b_x, p_codes, p_scale, o_row, m_n, i_scale, rows, MAX_CODE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                FORMAT: tl.constexpr, PER_TOKEN: tl.constexpr, INTERPRET: tl.constexpr):
    """Scale and codes of float32 rows [ROWS, D] of one head, zero where m_n is not set.

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
        tl.store(p_codes + o_row[:, None] * D + tl.arange(0, D)[None, :], b_codes, mask=m_n[:, None])
    elif FORMAT == "fp8":
        b_codes = to_fp8(tl.minimum(tl.maximum(b_x * b_inverse, -MAX_CODE), MAX_CODE), INTERPRET)
        tl.store(p_codes + o_row[:, None] * D + tl.arange(0, D)[None, :], b_codes, mask=m_n[:, None])
    elif FORMAT == "int4":
        b_cell = _cells(b_x, b_inverse * 0.5, -8.0, 7.0, INTERPRET) & 15
        b_low, b_high = tl.split(tl.reshape(b_cell, [ROWS, D // 2, 2]))
        tl.store(p_codes + o_row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :], (b_low | (b_high << 4)).to(tl.uint8),
                 mask=m_n[:, None])
    else:
        b_cell = _cells(b_x, b_inverse * 0.5, -2.0, 1.0, INTERPRET) & 3
        b_even, b_odd = tl.split(tl.reshape(b_cell, [ROWS, D // 4, 2, 2]))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        b_byte = b_0 | (b_1 << 2) | (b_2 << 4) | (b_3 << 6)
        tl.store(p_codes + o_row[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :], b_byte.to(tl.uint8), mask=m_n[:, None])
