"""Attention over all keys from attention over parts of them, merged by log-sum-exp, one part at a time."""
from __future__ import annotations

from ..buffers import Buffer
from ..language import tl, triton
from ..launch import launch
from ..quant.shapes import ceil_div

ROWS = 32


@triton.jit(do_not_specialize=["H", "N", "B", "rows"])
def merge_kernel(out, lse, part, part_lse, result, B, H, N, rows, D: tl.constexpr, PAD_D: tl.constexpr, ROWS: tl.constexpr,
                 TOKENS_FIRST: tl.constexpr):
    """ROWS rows of result: out and part weighed by their lse, which becomes that of both."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < rows
    i_h = o_r % H
    if TOKENS_FIRST:
        i_n, i_b = o_r // (B * H), o_r // H % B
    else:
        i_n, i_b = o_r // H % N, o_r // (N * H)
    p_lse = (i_b * H + i_h) * N + i_n
    b_a = tl.load(lse + p_lse, mask=m_r, other=float("-inf"))
    b_p = tl.load(part_lse + p_lse, mask=m_r, other=float("-inf"))
    b_top = tl.maximum(b_a, b_p)
    b_safe = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_wa, b_wp = tl.exp(b_a - b_safe), tl.exp(b_p - b_safe)
    b_sum = b_wa + b_wp
    b_inv = 1.0 / tl.where(b_sum > 0.0, b_sum, 1.0)
    o_d = tl.arange(0, PAD_D)
    o_x = o_r[:, None] * D + o_d[None, :]
    m_x = m_r[:, None] & (o_d < D)[None, :]
    b_x = tl.load(out + o_x, mask=m_x, other=0.0).to(tl.float32) * (b_wa * b_inv)[:, None]
    b_x += tl.load(part + o_x, mask=m_x, other=0.0).to(tl.float32) * (b_wp * b_inv)[:, None]
    tl.store(result + o_x, b_x.to(result.dtype.element_ty), mask=m_x)
    tl.store(lse + p_lse, tl.where(b_sum > 0.0, b_safe + tl.log(tl.where(b_sum > 0.0, b_sum, 1.0)), float("-inf")), mask=m_r)


def launch_merge(out: Buffer, lse: Buffer, part: Buffer, part_lse: Buffer, result: Buffer, *, shape: tuple[int, int, int, int],
                 tokens_first: bool) -> None:
    """result = out and part merged; lse becomes that of both. result may be `out` itself.

    shape: (B, H, N, D) of contiguous out, part and result, stored as [N, B, H, D] (tokens_first) or [B, N, H, D], in any float
    dtypes; lse, part_lse: float32 [B, H, N], natural log. A row that saw no key in either gives zeros and -inf.
    """
    batch, heads, tokens, head_dim = shape
    rows = batch * heads * tokens
    launch(merge_kernel, (ceil_div(rows, ROWS),), out, lse, part, part_lse, result, batch, heads, tokens, rows, D=head_dim,
           PAD_D=triton.next_power_of_2(head_dim), ROWS=ROWS, TOKENS_FIRST=tokens_first, num_warps=4)
