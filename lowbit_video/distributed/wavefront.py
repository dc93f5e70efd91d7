"""`Wavefront`: pieces of work that follow on each other, on several ranks: each layer hands its state to the next piece's rank.

Rank p % N works on piece p, and may run a layer as soon as the rank of piece p - 1 has: N ranks run through the layers one
behind the other. Every piece is worked on as on one rank, so the results are the same bits.

Nobody waits in a circle, even where a send returns only when the other rank takes it. In each piece a rank receives a layer's
state, then sends its own of that layer, one after the other. The last rank cannot: the first one, to which it sends, is busy
with its own piece until that has sent everything. So the last rank keeps its states back and sends them in its next piece,
N - 1 layers ahead of what it receives: that many the ranks before it take in while each waits for the next one to take one.
More would block, fewer would hold the first rank up.
"""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

from ..runtime.protocol import Runtime
from .group import ITEM_SIZES, Group, as_bytes, part_of
from .shares import begins
from .wire import Work


class Wavefront:
    """The states that this rank's pieces take and keep.

    group, degree: the first `degree` ranks of the group work, at least 2. pieces: how many there are. layers: what keeps a
    state, in the order of work, each with the shapes of its state's tensors. like: a tensor of their dtype, where they are.
    ahead: whether a state is called for as soon as the layer before has kept its own, to arrive during the work until it is
    taken; not for a CPU, where receiving holds the work up. purpose: as what the bytes are counted.
    numbers: of this rank's pieces. In each piece every layer takes, then keeps. Call `begin` before a piece, `end` after it.
    """

    def __init__(self, group: Group, degree: int, pieces: int, layers: Sequence[tuple[Hashable, Sequence[Sequence[int]]]],
                 like: Any, ahead: bool, runtime: Runtime, purpose: str) -> None:
        self.group, self.degree, self.pieces, self.layers = group, degree, pieces, layers
        self.like, self.ahead, self.runtime, self.purpose = like, ahead, runtime, purpose
        self.before, self.after = (group.rank - 1) % degree, (group.rank + 1) % degree
        self.numbers = range(group.rank, pieces if group.rank < degree else 0, degree)
        self._number = group.rank
        self._taken = 0  # layers of this piece that have taken
        self._coming: tuple[list[Any], list[Work]] | None = None
        self._kept_back: list[list[Any]] = []  # states of this piece, by the last rank of the chain
        self._owed: deque[list[Any]] = deque()  # and of its piece before
        self._leaving: list[tuple[Any, Work]] = []  # alive until they have left

    def begin(self, number: int) -> None:
        """Piece `number` begins."""
        self._number, self._taken, self._owed, self._kept_back = number, 0, deque(self._kept_back), []
        for _ in range(self.degree - 1):
            self._send_one_owed()
        if self.ahead:
            self._call()

    def take(self, layer: Hashable) -> list[Any] | None:
        """What the layer kept of the piece before; None in the first piece."""
        assert layer is self.layers[self._taken][0], "layers take in another order than was said"
        if not self.ahead:
            self._call()
        self._taken += 1
        if self._coming is None:
            return None
        (tensors, works), self._coming = self._coming, None
        for work in works:
            work.wait()
        return tensors

    def keep(self, layer: Hashable, tensors: list[Any]) -> None:
        """For the piece that follows. tensors: contiguous, each at the beginning of its own memory, not written to later."""
        if self._number + 1 < self.pieces:
            if self.group.rank == self.degree - 1:
                self._kept_back.append(tensors)
            else:
                self._send(tensors)
        if self.ahead and self._taken < len(self.layers):
            self._call()

    def end(self) -> None:
        """The piece is done."""
        if self._number == self.numbers[-1]:
            for tensors in self._kept_back:
                self._send(tensors)
        for _, work in self._leaving:
            work.wait()
        self._leaving.clear()

    def _call(self) -> None:
        """Lets the next layer's state come."""
        if self._number == 0:
            return
        dtype = self.runtime.dtype_name(self.like)
        tensors = [self.runtime.empty(shape, dtype, self.like) for shape in self.layers[self._taken][1]]
        self._coming = tensors, [self.group.receive(tensor, self.before) for tensor in tensors]
        self._send_one_owed()

    def _send_one_owed(self) -> None:
        if self._owed:
            self._send(self._owed.popleft())

    def _send(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            self._leaving.append((tensor, self.group.send(tensor, self.after, self.runtime, self.purpose)))


def gather_parts(mine: Sequence[Any], shapes: Sequence[Sequence[int]], owners: Sequence[int], like: Any, group: Group,
                 runtime: Runtime, purpose: str) -> list[Any]:
    """All parts of a result on every rank of a group, in order.

    mine: the parts of this rank, in their order. shapes, owners: each part's shape and its rank's place in the group. like: a
    tensor of their dtype, where they shall be. Ranks without a part call it all the same. Waits.
    """
    dtype = runtime.dtype_name(like)
    described = [(tuple(shape), dtype) for shape, owner in zip(shapes, owners) if owner == group.rank]
    assert described == [(runtime.shape(part), runtime.dtype_name(part)) for part in mine], "the parts are not as described"
    sizes = [math.prod(shape) * ITEM_SIZES[dtype] for shape in shapes]
    totals = [sum(size for size, owner in zip(sizes, owners) if owner == rank) for rank in range(group.size)]
    flat = [as_bytes(runtime.contiguous(part), runtime) for part in mine]
    sent = runtime.concat(flat * (group.size - 1), 0) if flat and group.size > 1 else runtime.empty((0,), "uint8", like)
    sent_bytes = [0 if rank == group.rank else totals[group.rank] for rank in range(group.size)]
    totals[group.rank] = 0
    received = runtime.empty((sum(totals),), "uint8", like)
    group.exchange(sent, sent_bytes, received, totals, purpose).wait()
    parts, offsets, own = [], begins(totals), iter(mine)
    for shape, size, owner in zip(shapes, sizes, owners):
        if owner == group.rank:
            parts.append(next(own))
            continue
        parts.append(part_of(received, offsets[owner], dtype, shape, runtime))
        offsets[owner] += size
    return parts
