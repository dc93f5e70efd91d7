"""Transfers of a split: who passes to whom, over which link, how many bytes, how long."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..mesh import Degrees
from ..shares import token_shares
from .figures import Link, named
from .task import Share, Task

BETWEEN_HOSTS = "ib400"
"""The link between hosts, unless the chosen one is slower."""


def groups(degrees: Degrees) -> dict[str, list[list[int]]]:
    """The ranks that pass something to each other, by what they share, placed as `Mesh` places them; of a ring, each two."""
    u, r, cfg = degrees.ulysses, degrees.ring, degrees.cfg
    rings = [[half * u * r + place + u * part for part in range(r)] for half in range(cfg) for place in range(u)]
    return {"ulysses": [list(range(first, first + u)) for first in range(0, degrees.ranks, u)],
            "ring": [[ring[part], ring[(part + 1) % r]] for ring in rings for part in range(r)],
            "sequence": [list(range(half * u * r, (half + 1) * u * r)) for half in range(cfg)],
            "cfg": [list(range(place, degrees.ranks, u * r)) for place in range(u * r)],
            "vae": [[rank, (rank + 1) % degrees.vae] for rank in range(degrees.vae)]}


@dataclass(frozen=True)
class Transfers:
    """How long transfers take: within a host over the task's link, between hosts of `gpu.host_ranks` over BETWEEN_HOSTS."""

    task: Task
    degrees: Degrees

    def crosses(self, group: str) -> bool:
        """Whether any group of this kind lies on several hosts."""
        return any(len({self._host(rank) for rank in ranks}) > 1 for ranks in groups(self.degrees)[group])

    def exchange_ms(self, sent: float, group: str) -> float:
        """Everyone with everyone, `sent` bytes by the busiest; on several hosts only what leaves a host takes the slow link."""
        near, far = self.task.figures.links[self.task.link], self._far()
        outside = max(sum(self._host(a) != self._host(b) for b in ranks) / max(1, len(ranks) - 1)
                      for ranks in groups(self.degrees)[group] for a in ranks)
        at = near.all_to_all_us if outside == 0 else far.all_to_all_us
        return at / 1e3 + max((1 - outside) * sent / near.all_to_all_gb_s, outside * sent / far.all_to_all_gb_s) / 1e6

    def neighbour_ms(self, sent: float, group: str = "ring") -> float:
        """From each rank to the next, at the pace of the slowest."""
        link = self._link(group)
        return link.neighbour_us / 1e3 + sent / link.neighbour_gb_s / 1e6

    def small_ms(self, group: str) -> float:
        """An exchange of some kilobytes."""
        return self._link(group).small_us / 1e3

    def _host(self, rank: int) -> int:
        return rank // self.task.figures.gpu.host_ranks

    def _link(self, group: str) -> Link:
        return self._far() if self.crosses(group) else self.task.figures.links[self.task.link]

    def _far(self) -> Link:
        links = self.task.figures.links
        return min(links[self.task.link], named(links, BETWEEN_HOSTS, "link"), key=lambda link: link.all_to_all_gb_s)


def ulysses_bytes(task: Task, degrees: Degrees, batch: int, pieces: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(Q, K and V that the busiest rank sends to the others of its Ulysses group, the output likewise), a layer.

    A rank keeps its own heads' rows, and sends its own rows of the others' heads; the output goes the other way.
    pieces: the heads of each rank, of each piece.
    """
    u, wire = degrees.ulysses, task.wire
    rows = token_shares(task.tokens, u * degrees.ring)
    there, back = [], []
    for rank, here in enumerate(rows):
        first = rank // u * u
        others = [rows[other] for other in range(first, first + u) if other != rank]
        there.append(sum(wire.operand_bytes(batch, sum(heads) - heads[rank - first], here) for heads in pieces))
        back.append(sum(wire.output_bytes(batch, heads[rank - first], count) for heads in pieces for count in others))
    return max(there), max(back)


def ring_bytes(task: Task, share: Share, heads: int) -> int:
    """K and V of so many heads that a rank passes on once."""
    return task.wire.ring_bytes(share.batch, heads, share.part_rows)


def statistics_bytes(task: Task, degrees: Degrees, batch: int) -> int:
    """What a rank tells the others of its Ulysses group and of its ring before it quantises, a layer."""
    each = task.wire.statistics * batch * task.model.heads * task.model.head_dim * 4
    return each * (degrees.ulysses - 1 + degrees.ring - 1)
