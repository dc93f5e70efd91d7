"""float32 to FP8 e4m3 inside a kernel: nearest, half to even, on the GPU and in Triton's interpreter alike."""
from __future__ import annotations

from .language import tl, triton

SPLIT = tl.constexpr(float(2**20 + 1))
"""Veltkamp's constant that leaves 4 of float32's 24 significant bits: e4m3's, with the implicit one."""
LEAST_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def to_fp8(x, INTERPRET: tl.constexpr):
    """x, at most 448 in magnitude, as float8e4nv. The interpreter's own conversion cuts bits off, so round before it."""
    if INTERPRET:
        b_lift = tl.where(tl.abs(x) < LEAST_NORMAL, tl.where(x < 0, -LEAST_NORMAL, LEAST_NORMAL), 0.0)
        b_x = x + b_lift
        b_carry = b_x * SPLIT
        x = b_carry - (b_carry - b_x) - b_lift
    return x.to(tl.float8e4nv)
