"""What a model's reports count, so that a replay, which passes no Python, counts what its forward did."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..distributed.parallelize import parallel_of
from ..distributed.watch import WatchedWire
from ..hook.report import Record, Records, attention_modules, dispatching_modules


@dataclass
class Counts:
    """The counters of a model (`Record` and `Traffic`) and copies of them; exchanges: begun on a watched wire.

    counters: each as it is and as it was. state: the wire's `State`, or None.
    """

    counters: list[tuple[Any, Any]]
    state: Any
    exchanges: int

    def since(self, before: Counts) -> Counts:
        """What was counted between that and this."""
        earlier = {id(counter): copy for counter, copy in before.counters}
        counters = [(counter, copy.since(earlier[id(counter)]) if id(counter) in earlier else copy)
                    for counter, copy in self.counters]
        return Counts(counters, self.state, self.exchanges - before.exchanges)

    def add(self) -> None:
        """Counts all of it once more."""
        for counter, copy in self.counters:
            counter.add(copy)
        if self.state is not None:
            self.state.count += self.exchanges

    def restore(self) -> None:
        """The counters are as they were; exchanges that have begun have begun."""
        for counter, copy in self.counters:
            counter.clear()
            counter.add(copy)


def counts_of(model: Any) -> Counts:
    """What a model has counted up to now."""
    parallel = parallel_of(model)
    state = parallel.mesh.wire.state if parallel is not None and isinstance(parallel.mesh.wire, WatchedWire) else None
    counters = [(counter, counter.copy()) for counter in _counters(model, parallel)]
    return Counts(counters, state, 0 if state is None else state.count)


def _counters(model: Any, parallel: Any) -> Iterator[Any]:
    for module in attention_modules(model).values():
        records = getattr(module.processor, "records", None)
        if isinstance(records, Records):
            yield records.of(module)
    for module in dispatching_modules(model).values():
        watched = getattr(module, "attention_calls", None)
        if watched is not None and isinstance(watched.record, Record):
            yield watched.record
    if parallel is not None:
        yield parallel.mesh.traffic
