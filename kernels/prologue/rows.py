"""Device functions: rows of Q or K as attention takes them, from what the projection left."""
from __future__ import annotations

from ..language import tl, triton


@triton.jit
def rounded(x, p_like, INTERPRET: tl.constexpr):
    """x as the dtype that p_like points to holds it, half to even, in float32. The interpreter only cuts bits off."""
    if INTERPRET and p_like.dtype.element_ty == tl.bfloat16:
        b_bits = x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
        x = b_bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(p_like.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def rotary_tile(cos, sin, o_n, begin, turned, D: tl.constexpr, ROWS: tl.constexpr):
    """(cos, sin) [ROWS, D / 2] of the tokens o_n; 1 and 0 for those that stay."""
    o_d = tl.arange(0, D)
    p_row = (o_n - begin).to(tl.int64)[:, None] * D + o_d[None, :]
    m_row = ((o_n >= begin) & (o_n < begin + turned))[:, None]
    b_cos, _ = tl.split(tl.reshape(tl.load(cos + p_row, mask=m_row, other=1.0), [ROWS, D // 2, 2]))
    b_sin, _ = tl.split(tl.reshape(tl.load(sin + p_row, mask=m_row, other=0.0), [ROWS, D // 2, 2]))
    return b_cos, b_sin


@triton.jit
def rows_of(p_x, stride_n, rest, seam, i_b, i_h, o_n, m_n, D: tl.constexpr):
    """Rows [ROWS, D] of one head as they lie in memory; zeros where m_n is not set.

    rest: (pointer, strides of batch, head and token) of the tokens from `seam` on; without a pointer all lie at p_x.
    """
    o_d = tl.arange(0, D)
    if rest[0] is None:
        b_x = tl.load(p_x + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m_n[:, None], other=0.0)
    else:
        # where token 0 would stand if the rest were all
        p_rest = rest[0] + i_b * rest[1] + i_h * rest[2] - seam.to(tl.int64) * rest[3]
        b_stride_n = tl.where(o_n < seam, stride_n, rest[3]).to(tl.int64)
        p_row = tl.where(o_n < seam, p_x, p_rest) + o_n * b_stride_n
        b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)
    return b_x.to(tl.float32)


@triton.jit
def prepared_rows(p_x, stride_n, rest, seam, i_b, i_h, o_n, m_n, weight, bias, eps, b_cos, b_sin, D: tl.constexpr,
                  ROWS: tl.constexpr, NORM: tl.constexpr, ROUNDS_FIRST: tl.constexpr, ROTARY: tl.constexpr,
                  INTERPRET: tl.constexpr):
    """Rows [ROWS, D] of one head in float32, normed and turned, each step rounded to x's dtype; zeros where m_n is not set."""
    o_d = tl.arange(0, D)
    b_x = rows_of(p_x, stride_n, rest, seam, i_b, i_h, o_n, m_n, D)
    if NORM is not None:
        if NORM == "layer":
            b_x -= (tl.sum(b_x, 1) / D)[:, None]
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        if ROUNDS_FIRST:
            b_x = rounded(b_x, p_x, INTERPRET)
        if weight is not None:
            b_x *= tl.load(weight + o_d).to(tl.float32)[None, :]
        if bias is not None:
            b_x += tl.load(bias + o_d).to(tl.float32)[None, :]
        b_x = rounded(b_x, p_x, INTERPRET)
    if ROTARY:
        b_even, b_odd = tl.split(tl.reshape(b_x, [ROWS, D // 2, 2]))
        b_x = tl.reshape(tl.join(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin), [ROWS, D])
        b_x = rounded(b_x, p_x, INTERPRET)
    return tl.where(m_n[:, None], b_x, 0.0)  # a bias is not zero
