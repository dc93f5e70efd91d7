"""Heads in pieces, so that the exchange of one goes on while another is computed."""
from __future__ import annotations

import functools
from typing import NamedTuple

from .shares import even_shares

QUERY_ROWS = {64: 192, 128: 128}
"""Query rows of a tile of the fastest kernel, by head dim; others are taken as 128."""
WIRE_TILES = 1.6 / 15, 1.2 / 15
"""What a head's exchange takes, in and out, in waves of tiles: 0.27 and 0.2 ms for 15 heads of 17776 tokens, where a wave is
0.17 ms (two H100s over NVLink). Only their proportions to a wave count, and only for the first and the last piece."""


class Piece(NamedTuple):
    """Heads first to first + count of all; each rank computes so many of them (shares), in order."""

    first: int
    count: int
    shares: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def head_pieces(heads: int, size: int, rows: int, processors: int | None) -> tuple[Piece, ...]:
    """Pieces of `heads` heads for `size` ranks: a small first one, whose exchange little hides, most of them, a small last one.

    rows: query rows of one head, batch counted, in tiles. processors: of the GPU, which run a tile each at a time; None: a CPU,
    which hides nothing, and all heads are one piece.
    """
    least = heads // size
    best = (least,)
    if processors is not None:
        candidates = [(first, least - first - last, last) for first in range(1, least) for last in range(1, least - first)]
        best = min([best, *candidates], key=lambda split: _waves(split, rows, processors))
    pieces, begin = [], 0
    for number, each in enumerate(best):
        count = heads - begin - sum(best[number + 1:]) * size if number == len(best) // 2 else each * size
        pieces.append(Piece(begin, count, tuple(even_shares(count, size))))
        begin += count
    return tuple(pieces)


def _waves(split: tuple[int, ...], rows: int, processors: int) -> float:
    """What a split costs, in waves of tiles."""
    computed = sum(-(-each * rows // processors) for each in split)
    return computed + split[0] * WIRE_TILES[0] + split[-1] * WIRE_TILES[1]
