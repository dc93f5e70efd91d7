"""Copies between memories by a table: one launch joins the records of several ranks, or puts heads beside each other."""
from __future__ import annotations

from collections.abc import Sequence

from ..buffers import Buffer
from ..language import tl, triton
from ..launch import launch
from ..quant.shapes import ceil_div
from .layout import Copy

WORD = 4
"""Bytes that are copied at once; every offset, stride and count is a multiple."""
VECTOR = 4
"""Words that a thread moves at once where everything is a multiple of them."""
TILE = 4096
"""Words that one program copies."""
COLUMNS = (512, 256, 128, 64)
"""Words of a row that one program copies: what fits the rows best; a long contiguous copy is cut into rows of the most."""
NUMBERS = 12
"""Numbers of a copy in the table: those of `layout.Copy` in words, its row's words and the words of all of it."""


@triton.jit
def copy_parts_kernel(source, second, target, table, row_blocks, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                      NUMBERS: tl.constexpr, VECTOR: tl.constexpr):
    """A tile [ROWS, COLUMNS] of copy i_c, one (batch, head); memories: int32 words; table: int64 [copies, NUMBERS]."""
    i_c = tl.program_id(0) // (row_blocks * column_blocks)
    i_tile = tl.program_id(0) % (row_blocks * column_blocks)
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    p_c = table + i_c * NUMBERS
    columns, total = tl.load(p_c + 9), tl.load(p_c + 10)
    if VECTOR > 1:
        columns, total = tl.multiple_of(columns, VECTOR), tl.multiple_of(total, VECTOR)
    i_row, i_col = i_tile // column_blocks * ROWS, i_tile % column_blocks * COLUMNS
    if (i_row * columns < total) & (i_col < columns):
        o_r, o_c = i_row + tl.arange(0, ROWS), i_col + tl.arange(0, COLUMNS)
        m_w = (o_c < columns)[None, :] & (o_r[:, None] * columns + o_c[None, :] < total)
        o_s = tl.load(p_c) + i_b * tl.load(p_c + 1) + i_h * tl.load(p_c + 2)
        o_t = tl.load(p_c + 4) + i_b * tl.load(p_c + 5) + i_h * tl.load(p_c + 6)
        s_row, t_row = tl.load(p_c + 3), tl.load(p_c + 7)
        if VECTOR > 1:
            o_s, o_t = tl.multiple_of(o_s, VECTOR), tl.multiple_of(o_t, VECTOR)
            s_row, t_row = tl.multiple_of(s_row, VECTOR), tl.multiple_of(t_row, VECTOR)
        o_x = o_s + o_r[:, None] * s_row + o_c[None, :]
        o_y = o_t + o_r[:, None] * t_row + o_c[None, :]
        if tl.load(p_c + 11) == 0:
            tl.store(target + o_y, tl.load(source + o_x, mask=m_w), mask=m_w)
        else:
            tl.store(target + o_y, tl.load(second + o_x, mask=m_w), mask=m_w)


def table_of(copies: Sequence[Copy]) -> list[list[int]]:
    """The copies as the kernel reads them. Raises AssertionError for one that does not go by words."""
    rows = []
    for one in copies:
        words = [number // WORD for number in one[:8]]
        assert all(number % WORD == 0 for number in (*one[:8], one.count)), one
        count, total = one.count // WORD, one.rows * one.count // WORD
        if one.rows == 1:
            count = words[3] = words[7] = COLUMNS[0]
        rows.append([*words, one.rows, count, total, int(one.second)])
    return rows


def launch_copy_parts(source: Buffer, second: Buffer, target: Buffer, table: Buffer, rows: Sequence[Sequence[int]], *,
                      batch: int, heads: int) -> None:
    """Does the copies of a table for every batch and head.

    source, second, target: memories, read as int32. rows: of `table_of`; table: the same, int64 [copies, NUMBERS].
    """
    width = max(row[9] for row in rows)
    columns = min(COLUMNS, key=lambda count: ceil_div(width, count) * count)
    row_blocks = max(ceil_div(ceil_div(row[10], row[9]), TILE // columns) for row in rows)
    column_blocks = ceil_div(width, columns)
    # the words of all must do as well: the last vector of a contiguous copy may not reach past its end
    even = all(number % VECTOR == 0 for row in rows for number in (*row[:8], row[9], row[10]))
    launch(copy_parts_kernel, (len(rows) * row_blocks * column_blocks, heads, batch), source, second, target, table, row_blocks,
           column_blocks, ROWS=TILE // columns, COLUMNS=columns, NUMBERS=NUMBERS, VECTOR=VECTOR if even else 1, num_warps=8)
