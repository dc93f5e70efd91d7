"""Heads in pieces, so that the exchange of one goes on while another is computed."""
from __future__ import annotations

import functools
from typing import NamedTuple

from .shares import even_shares

QUERY_ROWS = {64: 192, 128: 128}
"""Query rows of a tile of the fastest kernel, by head dim; others are taken as 128."""
WIRE_WAVES = 1.6 / 15
"""What a head's exchange takes on its way in, in waves of tiles: 0.27 ms for 15 heads of 17776 tokens, where a wave is 0.17 ms
(two H100s over NVLink)."""
BESIDE = 2.0
"""How many times as long an exchange takes beside attention, which leaves it few multiprocessors."""
PIECE_WAVES = 0.15
"""What a piece costs by itself, likewise: launches and waits."""
WHOLE_BELOW = {"paddle": 15.0}
"""Waves of tiles of all heads below which they go in one piece, by framework: what the host does for a second one takes longer
there than that one hides. On four H100s through a custom device 11 waves (CogVideoX-2b) are faster in one piece by 12 to 29 %,
17 (5b) reach 90 % of an even share in two (eval/speed/NOTES.md)."""


class Piece(NamedTuple):
    """Heads first to first + count of all; each rank computes so many of them (shares), in order."""

    first: int
    count: int
    shares: tuple[int, ...]


def rows_in_tiles(batch: int, tokens: int, head_dim: int) -> int:
    """Query rows of one head of so many tokens, in tiles."""
    return batch * -(-tokens // QUERY_ROWS.get(head_dim, 128))


def gathered_waves(batch: int, size: int) -> float:
    """What a head's keys and values take to come together from `size` ranks, as WIRE_WAVES, which is of Q, K and V of half
    of the tokens of two samples."""
    return WIRE_WAVES * batch * (size - 1) / size * 2 / 3


@functools.lru_cache(maxsize=256)
def head_pieces(heads: int, size: int, rows: int, processors: int | None, framework: str, wire_waves: float = WIRE_WAVES
                ) -> tuple[Piece, ...]:
    """`heads` heads for `size` ranks, in one piece or two: a small first one, during which the codes of the others arrive.

    rows: query rows of one head of one rank's tokens, batch counted, in tiles; every rank's are computed by themselves.
    processors: of the GPU, which run a tile each at a time; None: a CPU, which hides nothing. framework: whose host launches,
    as WHOLE_BELOW names it. wire_waves: as WIRE_WAVES.
    """
    least = heads // size
    splits = [(least,), *((first, least - first) for first in range(1, least))]
    whole = processors is None or heads * rows / processors < WHOLE_BELOW.get(framework, 0.0)
    best = splits[0] if whole else min(splits, key=lambda split: _waves(split, size, rows, processors, wire_waves))
    pieces, begin = [], 0
    for number, each in enumerate(best):
        count = heads - begin if number == len(best) - 1 else each * size
        pieces.append(Piece(begin, count, tuple(even_shares(count, size))))
        begin += count
    return tuple(pieces)


def _waves(split: tuple[int, ...], size: int, rows: int, processors: int, wire_waves: float) -> float:
    """What a split costs, in waves of tiles: what is computed, the way in of the first piece, what else is waited for."""
    computed = [size * -(-each * rows // processors) for each in split]
    waits = sum(max(0.0, each * wire_waves * BESIDE - before) for each, before in zip(split[1:], computed))
    return sum(computed) + split[0] * wire_waves + waits + PIECE_WAVES * len(split)
