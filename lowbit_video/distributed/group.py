"""`Group`: some ranks of a run, by their place in it, and the transfers that this project needs among them.

All of them are `Wire.exchange`, so a group of some ranks needs no communicator of its own. Bytes that leave this process are
counted, beside what the same values would have been in 16 bits.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.checks import refuse_gradients
from ..runtime.protocol import Runtime
from .wire import Wire, Work


@dataclass
class Traffic:
    """What left this process.

    sent: bytes by what they were for ("attention in", "attention out", "statistics", "guidance", "decode", ...).
    in_16_bit: bytes that the same values would have been at two bytes each. notes: what a reader of the counts should know.
    """

    sent: dict[str, int] = field(default_factory=dict)
    in_16_bit: dict[str, int] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)

    def count(self, purpose: str, sent: int, in_16_bit: int | None = None) -> None:
        """Adds bytes; in_16_bit None: as many as were sent."""
        self.sent[purpose] = self.sent.get(purpose, 0) + sent
        self.in_16_bit[purpose] = self.in_16_bit.get(purpose, 0) + (sent if in_16_bit is None else in_16_bit)

    def note(self, text: str) -> None:
        """Adds a note; once is enough."""
        self.notes.add(text)

    def clear(self) -> None:
        """Forgets all counts and notes."""
        self.sent.clear()
        self.in_16_bit.clear()
        self.notes.clear()

    def copy(self) -> Traffic:
        """One with the same counts and notes."""
        return Traffic(dict(self.sent), dict(self.in_16_bit), set(self.notes))

    def since(self, before: Traffic) -> Traffic:
        """What was counted after `before`, an earlier copy, and all notes."""
        less = lambda now, then: {purpose: count - then.get(purpose, 0) for purpose, count in now.items()
                                  if count != then.get(purpose)}
        return Traffic(less(self.sent, before.sent), less(self.in_16_bit, before.in_16_bit), set(self.notes))

    def add(self, more: Traffic) -> None:
        """Counts and notes what another one has."""
        for purpose, count in more.sent.items():
            self.count(purpose, count, more.in_16_bit.get(purpose, 0))
        self.notes |= more.notes

    def as_dict(self) -> dict:
        """The counts as plain values, with their sums."""
        return {"sent": dict(self.sent), "in_16_bit": dict(self.in_16_bit), "sent_total": sum(self.sent.values()),
                "in_16_bit_total": sum(self.in_16_bit.values()), "notes": sorted(self.notes)}


class Group:
    """Some ranks of a wire.

    ranks: their numbers on the wire, in the group's own order; this process is one of them. traffic: where bytes are
    counted; groups of one run share it.
    rank: this process's place in the group. size: how many ranks it has.
    Raises ValueError where this process is not in it.
    """

    def __init__(self, wire: Wire, ranks: Sequence[int], traffic: Traffic | None = None) -> None:
        self.wire, self.ranks = wire, tuple(ranks)
        self.traffic = Traffic() if traffic is None else traffic
        if wire.rank not in self.ranks:
            raise ValueError(f"rank {wire.rank} is not among the ranks {list(self.ranks)} of this group")
        self.rank, self.size = self.ranks.index(wire.rank), len(self.ranks)

    def exchange(self, sent: Any, sent_bytes: Sequence[int], received: Any, received_bytes: Sequence[int], purpose: str,
                 in_16_bit: int | None = None) -> Work:
        """Everyone to everyone in the group; what `Wire.exchange` says, by place in the group.

        The pieces lie in the order of the group's places; this rank's own is of no bytes. purpose, in_16_bit: for the count.
        """
        assert not sent_bytes[self.rank] and not received_bytes[self.rank], "a rank exchanges nothing with itself"
        by_rank = [[0] * self.wire.size, [0] * self.wire.size]
        for place, rank in enumerate(self.ranks):
            by_rank[0][rank], by_rank[1][rank] = sent_bytes[place], received_bytes[place]
        self.traffic.count(purpose, sum(sent_bytes), in_16_bit)
        return self.wire.exchange(sent, by_rank[0], received, by_rank[1])

    def all_gather(self, tensor: Any, runtime: Runtime, purpose: str, meanwhile: Callable[[], object] | None = None
                   ) -> list[Any]:
        """Everyone's tensor, by place; all of one shape and dtype. Waits (see `Work.wait`). meanwhile: to do before that."""
        shape = runtime.shape(tensor)
        parts = self.all_gather_rows(tensor.reshape([1, *shape]), [1] * self.size, runtime, purpose, meanwhile)
        return [part.reshape(list(shape)) for part in parts]

    def all_gather_rows(self, tensor: Any, rows: Sequence[int], runtime: Runtime, purpose: str,
                        meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Everyone's tensor, by place, where the first dimensions differ. rows: [size], everyone's first dimension.

        Raises UnsupportedError where gradients are asked for: none travel back.
        """
        if self.size == 1:
            return [tensor]
        refuse_gradients(runtime, tensor)
        dtype, shape = runtime.dtype_name(tensor), runtime.shape(tensor)
        flat = as_bytes(runtime.contiguous(tensor), runtime)
        row = runtime.shape(flat)[0] // shape[0]
        sizes = [count * row for count in rows]
        received, begins, work = self.start_gather(flat, sizes, runtime, purpose)
        if meanwhile is not None:
            meanwhile()
        work.wait()
        return [tensor if place == self.rank else part_of(received, begins[place], dtype, (rows[place], *shape[1:]), runtime)
                for place in range(self.size)]

    def start_gather(self, flat: Any, sizes: Sequence[int], runtime: Runtime, purpose: str, in_16_bit: int | None = None
                     ) -> tuple[Any, list[int], Work]:
        """(where everyone's bytes but this rank's arrive, the byte that each place's begin at there, their transfer).

        flat: this rank's, contiguous uint8 [bytes]. sizes: everyone's, by place. in_16_bit: of this rank's to one other.
        """
        received_bytes, sent_bytes = list(sizes), [sizes[self.rank]] * self.size
        received_bytes[self.rank] = sent_bytes[self.rank] = 0
        sent = flat if self.size == 2 else runtime.concat([flat] * (self.size - 1), 0)
        received = runtime.empty((sum(received_bytes),), "uint8", flat)
        work = self.exchange(sent, sent_bytes, received, received_bytes, purpose,
                             None if in_16_bit is None else in_16_bit * (self.size - 1))
        return received, [sum(received_bytes[:place]) for place in range(self.size)], work

    def send(self, tensor: Any, to: int, runtime: Runtime, purpose: str) -> Work:
        """A contiguous tensor to the rank of a place."""
        self.traffic.count(purpose, _size_of(tensor, runtime))
        return self.wire.send(tensor, self.ranks[to])

    def receive(self, tensor: Any, source: int) -> Work:
        """Into a contiguous tensor, from the rank of a place."""
        return self.wire.receive(tensor, self.ranks[source])

    def barrier(self) -> None:
        """Returns when every rank of the whole run has called it."""
        self.wire.barrier()

    def __str__(self) -> str:
        return f"ranks {', '.join(map(str, self.ranks))}"


ITEM_SIZES = {"int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4,
              "float64": 8, "int64": 8}
"""Bytes of an element, by dtype."""


def _size_of(tensor: Any, runtime: Runtime) -> int:
    count = ITEM_SIZES[runtime.dtype_name(tensor)]
    for length in runtime.shape(tensor):
        count *= length
    return count


def as_bytes(tensor: Any, runtime: Runtime) -> Any:
    """A contiguous tensor's memory as uint8 [bytes], without a copy."""
    return runtime.view(tensor.reshape([-1]), "uint8")


def part_of(flat: Any, begin: int, dtype: str, shape: Sequence[int], runtime: Runtime) -> Any:
    """A tensor of that dtype and shape in the memory of a contiguous uint8 [bytes], from byte `begin` on, without a copy.

    begin, and the length of `flat`: multiples of the dtype's size. Read as the dtype first and cut then: Paddle 3.3.1's view of
    a tensor that begins later in its memory begins at a wrong place.
    """
    count, size = 1, ITEM_SIZES[dtype]
    for length in shape:
        count *= length
    return runtime.view(flat, dtype)[begin // size:begin // size + count].reshape(list(shape))


def without(flat: Any, begin: int, end: int, runtime: Runtime) -> Any:
    """uint8 [bytes] without those from begin to end; copied only where some remain on both sides."""
    if begin and end < runtime.shape(flat)[0]:
        return runtime.concat([flat[:begin], flat[end:]], 0)
    return flat[:begin] if begin else flat[end:]
