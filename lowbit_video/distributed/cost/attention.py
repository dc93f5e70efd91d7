"""Attention of one layer as the wrappers do it: waves of tiles over the multiprocessors, a ring's parts, heads in pieces."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lowbit_video.kernels.formats import BLOCK_K

from ...precision import as_precision
from ..keys_part import MOST_BYTES
from ..mesh import Degrees
from ..pieces import gathered_waves, head_pieces, rows_in_tiles
from ..shares import even_shares
from .task import Share, Task, share_of
from .wire import Transfers, ring_bytes, ulysses_bytes


@dataclass(frozen=True)
class Layer:
    """Attention of one layer on the busiest rank, ms: attention with quantisation, and what of the exchange is not hidden."""

    attention_ms: float
    exchange_ms: float

    @property
    def total_ms(self) -> float:
        return self.attention_ms + self.exchange_ms


def waves(calls: int, rows: int, tile_rows: int, sms: int) -> int:
    """How often the tiles of `calls` heads of `rows` query rows fill the GPU."""
    return -(-calls * -(-rows // tile_rows) // sms)


def kernel_ms(task: Task, calls: int, q_rows: int, k_rows: int) -> float:
    """The kernel over `calls` (batch x heads) of so many rows, without quantisation."""
    tile, dim = task.figures.attention[task.model.head_dim], task.model.head_dim
    one = tile.tile_us + tile.block_us * k_rows / BLOCK_K
    count = waves(calls, q_rows, tile.rows, task.figures.gpu.sms)
    return (count * one * task.figures.pace[task.precision][dim] + tile.call_us) / 1e3


def quantise_ms(task: Task, calls: int, rows: int) -> float:
    """Quantisation; rows: of Q, K and V together."""
    exact = as_precision(task.precision).exact
    return 0.0 if exact else calls * rows * task.model.head_dim * task.figures.around.quantise_ps / 1e9


def call_ms(task: Task, calls: int, q_rows: int, k_rows: int) -> float:
    """Quantisation and kernel."""
    return kernel_ms(task, calls, q_rows, k_rows) + quantise_ms(task, calls, q_rows + 2 * k_rows)


def ring_ms(task: Task, degrees: Degrees, share: Share, heads: int) -> tuple[float, float]:
    """(attention of these heads against all parts that go round, what of their transfers is not hidden); one part: no transfer.

    Where values travel, each part is quantised when it is there.
    """
    calls, rows = share.batch * heads, share.part_rows
    part = (call_ms if task.wire.kind is None else kernel_ms)(task, calls, rows, rows)
    if degrees.ring == 1:
        return part, 0.0
    transfer = Transfers(task, degrees).neighbour_ms(ring_bytes(task, share, heads))
    around = task.figures.around
    merge = calls * rows * task.model.head_dim * around.merge_ps / 1e9
    waits = max(0.0, transfer - part) + (1 - around.hidden_share) * min(part, transfer)
    return degrees.ring * part + (degrees.ring - 1) * merge, (degrees.ring - 1) * waits


def gathers(task: Task, degrees: Degrees, share: Share) -> bool:
    """Whether the codes of a ring's keys come together, as `ring` has it: on one host, not too many, no heads shared around."""
    return (task.keys == "gathered" and degrees.ring > 1 and degrees.ulysses == 1 and task.wire.kind is not None
            and not Transfers(task, degrees).crosses("ring")
            and task.wire.ring_bytes(share.batch, task.model.heads, task.tokens) <= MOST_BYTES)


def pieces_of(task: Task, degrees: Degrees, share: Share) -> list[tuple[int, ...]]:
    """The heads of each rank of a Ulysses group, of each piece, as the wrapper cuts them; values go in one."""
    heads, dim = task.model.heads, task.model.head_dim
    if task.wire.kind is None:
        return [tuple(even_shares(heads, degrees.ulysses))]
    tiles = rows_in_tiles(share.batch, share.rows, dim)
    return [piece.shares for piece in head_pieces(heads, degrees.ulysses, tiles, task.figures.gpu.sms, task.framework)]


class Piece(NamedTuple):
    """Of a piece of heads, ms: quantisation before it travels, the way in, what joins it, attention, the way back, and what
    puts it in its place."""

    before: float
    there: float
    join: float
    attend: float
    back: float
    place: float


def pipelined_ms(pieces: Sequence[Piece], hidden_share: float) -> float:
    """All pieces: prepared and sent one after the other, then each computed when it is there and sent back; the wire takes one
    transfer at a time. Of transfers beside attention, all but the first and the last, `hidden_share` is gained.
    """
    now = wire = 0.0
    arrived = []
    for piece in pieces:
        now += piece.before
        wire = max(wire, now) + piece.there
        arrived.append(wire)
    came_back = []
    for piece, arrival in zip(pieces, arrived):
        now = max(now, arrival) + piece.join + piece.attend
        wire = max(wire, now) + piece.back
        came_back.append(wire)
    for piece, arrival in zip(pieces, came_back):
        now = max(now, arrival) + piece.place
    beside = sum(piece.there + piece.back for piece in pieces) - pieces[0].there - pieces[-1].back
    return now + (1 - hidden_share) * min(beside, sum(piece.attend for piece in pieces))


def gathered_pieces(task: Task, degrees: Degrees, share: Share) -> list[Piece]:
    """The pieces in which all keys come together, of the heads as `ring` cuts them."""
    heads, ring, batch = task.model.heads, degrees.ring, share.batch
    tiles = rows_in_tiles(batch, share.rows, task.model.head_dim)
    made = []
    for piece in head_pieces(heads, 1, tiles, task.figures.gpu.sms, task.framework, gathered_waves(batch, ring)):
        there = Transfers(task, degrees).exchange_ms((ring - 1) * ring_bytes(task, share, piece.count), "ring")
        made.append(Piece(quantise_ms(task, batch * piece.count, 3 * share.rows), there,
                          copy_ms(task, task.wire.ring_bytes(batch, piece.count, task.tokens)),
                          kernel_ms(task, batch * piece.count, share.rows, task.tokens), 0.0, 0.0))
    return made


def copy_ms(task: Task, count: float) -> float:
    """Bytes read and written."""
    return 2 * count / task.figures.around.copy_gb_s / 1e6


def layer(task: Task, degrees: Degrees) -> Layer:
    """Attention of one layer with its exchange. Raises ValueError where the split cannot be."""
    share, transfers = share_of(task, degrees), Transfers(task, degrees)
    model, coded = task.model, task.wire.kind is not None  # then each rank quantises its own tokens first
    quantise = quantise_ms(task, share.batch * model.heads, 3 * share.rows) if coded else 0.0
    told = sum(transfers.small_ms(group) for group, size in (("ulysses", degrees.ulysses), ("ring", degrees.ring))
               if size > 1) if task.wire.statistics and coded else 0.0
    if gathers(task, degrees, share):
        pieces = gathered_pieces(task, degrees, share)
        attention = sum(piece.attend for piece in pieces)
        total = told + pipelined_ms(pieces, task.figures.around.hidden_share)
        return Layer(quantise + attention, total - quantise - attention)
    if degrees.ulysses == 1:
        attention, waits = ring_ms(task, degrees, share, share.heads)
        return Layer(quantise + attention, told + waits)
    pieces, attention = [], 0.0
    for heads in pieces_of(task, degrees, share):
        there, back = ulysses_bytes(task, degrees, share.batch, [heads])
        attend, waits = ring_ms(task, degrees, share, max(heads))
        attention += attend
        own = task.wire.operand_bytes(share.batch, sum(heads), share.rows)
        output = quantise_ms(task, share.batch * sum(heads), share.rows) if task.wire.output == "int8" and coded else 0.0
        pieces.append(Piece(
            quantise * sum(heads) / model.heads if coded else copy_ms(task, own),
            transfers.exchange_ms(there, "ulysses") if coded else 3 * transfers.exchange_ms(there / 3, "ulysses"),
            copy_ms(task, task.wire.operand_bytes(share.batch, max(heads), share.part_rows)),
            attend + waits + output, transfers.exchange_ms(back, "ulysses"),
            output + copy_ms(task, task.wire.output_bytes(share.batch, sum(heads), share.rows))))
    total = told + pipelined_ms(pieces, task.figures.around.hidden_share)
    return Layer(quantise + attention, total - quantise - attention)
