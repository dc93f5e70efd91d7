"""Attention of one layer: waves of tiles over the multiprocessors, a ring's parts, and heads exchanged in pieces."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit_video.kernels.formats import BLOCK_K

from ...precision import as_precision
from ..mesh import Degrees
from ..shares import even_shares
from .task import Share, Task, share_of
from .wire import Transfers, ring_bytes, ulysses_bytes

MAX_PIECES = 8
"""The most pieces that heads are exchanged in; the number that is fastest is taken."""
COPIES = 4
"""Heads are sorted before an exchange and after it, each time read and written."""


@dataclass(frozen=True)
class Layer:
    """Attention of one layer on the busiest rank, ms: attention with quantisation, and what of the exchange is not hidden."""

    attention_ms: float
    exchange_ms: float
    pieces: int = 1

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
    """(attention of these heads against all parts, what of their transfers is not hidden); one part: no transfer."""
    calls, rows = share.batch * heads, share.part_rows
    part = (kernel_ms if task.wire.coded and degrees.ranks > degrees.cfg else call_ms)(task, calls, rows, rows)
    if degrees.ring == 1:
        return part, 0.0
    transfer = Transfers(task, degrees).neighbour_ms(ring_bytes(task, share, heads))
    around = task.figures.around
    merge = calls * rows * task.model.head_dim * around.merge_ps / 1e9
    waits = max(0.0, transfer - part) + (1 - around.hidden_share) * min(part, transfer)
    return degrees.ring * part + (degrees.ring - 1) * merge, (degrees.ring - 1) * waits


def pipelined_ms(computes: Sequence[float], there: float, back: float, hidden_share: float) -> float:
    """Pieces one after the other: each is sent (`there` ms), computed and sent back, and the wire takes one at a time.

    The next piece is sent before the last one's result. Of what goes on beside a computation `hidden_share` is gained.
    """
    wire = arrived = there
    done = 0.0
    for number, compute in enumerate(computes):
        done = max(done, arrived) + compute
        if number + 1 < len(computes):
            wire = arrived = wire + there
        wire = max(wire, done) + back
    beside = (len(computes) - 1) * (there + back)
    return wire + (1 - hidden_share) * min(beside, sum(computes))


def layer(task: Task, degrees: Degrees) -> Layer:
    """Attention of one layer with its exchange. Raises ValueError where the split cannot be."""
    share = share_of(task, degrees)
    u, around = degrees.ulysses, task.figures.around
    before = statistics = 0.0
    transfers = Transfers(task, degrees)
    if task.wire.coded and u * degrees.ring > 1:  # codes travel, so each rank quantises its own tokens first
        before = quantise_ms(task, share.batch * task.model.heads, 3 * share.rows)
        statistics = transfers.small_ms("ulysses") if u > 1 else 0.0
    if u == 1:
        attention, waits = ring_ms(task, degrees, share, share.heads)
        return Layer(before + attention, waits)
    there, back = ulysses_bytes(task, degrees, share.batch)
    sort = COPIES * (there + back) / around.copy_gb_s / 1e6
    if task.wire.output == "int8":  # to codes before, and back after
        sort += 2 * quantise_ms(task, share.batch * task.model.heads, share.rows)
    best = None
    for pieces in range(1, min(share.heads, MAX_PIECES) + 1):
        parts = [ring_ms(task, degrees, share, heads) for heads in even_shares(share.heads, pieces)]
        total = pipelined_ms([sum(part) for part in parts], transfers.exchange_ms(there / pieces, "ulysses"),
                             transfers.exchange_ms(back / pieces, "ulysses"), around.hidden_share)
        if best is None or total < best[0]:
            best = total, sum(attention for attention, _ in parts), pieces
    total, attention, pieces = best
    return Layer(before + attention, statistics + sort + total - attention, pieces)
