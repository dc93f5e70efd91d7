"""Copies between two memories by a table: one launch cuts records out of codes, joins them, or puts heads beside each other."""
from __future__ import annotations

import triton
import triton.language as tl

from ..buffers import Buffer
from ..launch import launch
from ..quant.shapes import ceil_div

COLUMNS = 10
"""Numbers of a copy in the table, those of `layout.Copy`, in words of 4 bytes but for `rows`."""
BLOCK = 4096
"""Words that one program copies."""


@triton.jit
def copy_parts_kernel(source, target, table, blocks, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Block i_p of copy i_c of one (batch, head); source, target: int32 words; table: int64 [copies, COLUMNS]."""
    i_c, i_p = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    p_row = table + i_c * COLUMNS
    rows, count = tl.load(p_row + 8), tl.load(p_row + 9)
    if i_p * BLOCK < rows * count:
        o_w = i_p * BLOCK + tl.arange(0, BLOCK)
        i_row, i_word = o_w // count, o_w % count
        m_w = o_w < rows * count
        p_s = source + tl.load(p_row) + i_b * tl.load(p_row + 1) + i_h * tl.load(p_row + 2)
        p_t = target + tl.load(p_row + 4) + i_b * tl.load(p_row + 5) + i_h * tl.load(p_row + 6)
        b_w = tl.load(p_s + i_row * tl.load(p_row + 3) + i_word, mask=m_w)
        tl.store(p_t + i_row * tl.load(p_row + 7) + i_word, b_w, mask=m_w)


def launch_copy_parts(source: Buffer, target: Buffer, table: Buffer, *, copies: int, largest: int, batch: int, heads: int
                      ) -> None:
    """Does the copies of a table for every batch and head.

    source, target: memories read as int32. table: int64 [copies, COLUMNS]. largest: words of one (batch, head) in the largest.
    """
    blocks = ceil_div(largest, BLOCK)
    launch(copy_parts_kernel, (copies * blocks, heads, batch), source, target, table, blocks, BLOCK=BLOCK, COLUMNS=COLUMNS,
           num_warps=8)
