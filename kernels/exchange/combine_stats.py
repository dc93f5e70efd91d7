"""Statistics of all tokens from those of the shares: weighted means and maxima, in a fixed order."""
from __future__ import annotations

from ..buffers import Buffer
from ..language import tl, triton
from ..launch import launch
from ..quant.shapes import ceil_div

BLOCK = 1024


@triton.jit(do_not_specialize=["n", "shares"])
def combine_stats_kernel(gathered, weights, out, n, shares, MEANS: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of statistic i_s; gathered: [shares, STATISTICS, n], weights: [MEANS, shares], out: [STATISTICS, n], float32."""
    i_s, o_n = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_acc = tl.zeros([BLOCK], tl.float32)
    for i_r in range(0, shares):
        b_x = tl.load(gathered + (i_r * STATISTICS + i_s).to(tl.int64) * n + o_n, mask=m_n, other=0.0)
        if i_s < MEANS:
            b_acc += b_x * tl.load(weights + i_s * shares + i_r)
        else:
            b_acc = tl.maximum(b_acc, b_x)
    tl.store(out + i_s.to(tl.int64) * n + o_n, b_acc, mask=m_n)


def launch_combine_stats(gathered: Buffer, weights: Buffer, out: Buffer, *, n: int, shares: int, means: int, statistics: int
                         ) -> None:
    """out [statistics, n] of gathered [shares, statistics, n]; see `reference.combine_stats`. Maxima are not negative."""
    launch(combine_stats_kernel, (ceil_div(n, BLOCK), statistics), gathered, weights, out, n, shares, MEANS=means,
           STATISTICS=statistics, BLOCK=BLOCK, num_warps=4)
