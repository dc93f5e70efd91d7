"""Number formats of the operands: how many bits a code has, its range, its rounding and its packing.

A value is `code * scale` with a float32 scale, rounded to the nearest, half to even. int4 and int2 are
mid-rise: a two's complement nibble (or crumb) c stands for `(2 * c + 1) * scale`, so that all 16 (or 4)
levels are used, symmetrically, and the range is cut into 16 cells instead of 14: 1.1 dB better than
codes -7..7 on normal data. In a byte the odd value is one AND and one OR away: c << 4 | 8 is
8 * (2c + 1), c << 6 | 32 is 32 * (2c + 1). Formats have names, not bits: int4 is not fp4.
"""
from __future__ import annotations

from dataclasses import dataclass

BLOCK_K = 128
"""Key rows that share one scale at block granularity; V's transposed copy is padded to a multiple of it."""
MIN_MAGNITUDE = 1e-30
"""Floor under every absmax or rms, so that an all-zero group has a scale and never divides 0 by 0."""
INT2_STEP = 0.498
"""Half the step of the optimal four-level quantiser of a normal variable, in units of its rms (Max 1960, table I)."""
P_SHIFT = 8.0
"""FP8 probabilities are stored as exp2(s - max + P_SHIFT): their scale is 2**8, under e4m3's 448."""
LINE_SHIFT = 6.94375
"""A code of e4m3 is nearly its own logarithm: 8 (x + LINE_SHIFT) for 2**x. e4m3 starts at 2**-6 with code 8; 0.45 / 8 less
makes the codes right on average."""
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
MIN_SCORE = -1.0e30
"""Start of the running row maximum; finite, so that differences of maxima are never NaN."""
PERMUTATION_16 = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Key index held at each position of 16 in V's transposed FP8 copy: position 4t+2h+e holds row 8h+2t+e.

With it the accumulator registers of Q.K^T, converted to FP8, already are the A operand of P.V.
"""


@dataclass(frozen=True)
class Format:
    """One number format.

    name: what precision strings call it. bits: per code. max_code: scale is absmax / max_code (int2:
    rms * INT2_STEP); int4's cells end at 16, its outermost level is 15. codes_per_byte: 1, 2 or 4 along
    head_dim, first element in the lowest bits.
    storage: dtype name of the stored array. scaled: False for the formats of exact attention.
    """

    name: str
    bits: int
    max_code: float
    codes_per_byte: int
    storage: str
    scaled: bool = True

    def __str__(self) -> str:
        return self.name


FORMATS = {
    f.name: f
    for f in (
        Format("int8", 8, 127.0, 1, "int8"),
        Format("int4", 4, 16.0, 2, "uint8"),
        Format("int2", 2, 4.0, 4, "uint8"),
        Format("fp8", 8, 448.0, 1, "float8_e4m3fn"),
        Format("fp16", 16, 65504.0, 1, "float16", scaled=False),
        Format("bf16", 16, 3.3895313892515355e38, 1, "bfloat16", scaled=False),
        Format("fp32", 32, 3.4028234663852886e38, 1, "float32", scaled=False),
    )
}
"""Every format by name."""

QK_FORMATS = tuple(name for name, f in FORMATS.items() if f.scaled)
"""Formats that Q and K can be quantised to."""


def scale_block(operand: str, granularity: str) -> int | None:
    """Rows of operand "q" or "k" that share one scale: BLOCK_K rows of K at "block" granularity, else None, one per row.

    Q has a scale per row always: a kernel holds its rows' scales in registers anyway, and 8 bits gain 0.5 dB.
    """
    return BLOCK_K if operand == "k" and granularity == "block" else None

ROTATED = (64, 128)
"""Head dims whose channels can be rotated before they are quantised."""

EXACT_FORMATS = tuple(name for name, f in FORMATS.items() if not f.scaled)
"""Formats of exact attention: those that tensors have themselves."""

FORMAT_OF_DTYPE = {FORMATS[name].storage: name for name in EXACT_FORMATS}
"""The exact format of each dtype that tensors may have."""


def get_format(name: str) -> Format:
    """The format of that name; ValueError lists what exists."""
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"unknown number format {name!r}; there are: {', '.join(FORMATS)}") from None
