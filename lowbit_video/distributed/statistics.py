"""What ranks tell each other before they quantise: how many tokens each has, and statistics of them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..engine import codes as engine
from ..engine.options import AttentionOptions
from ..runtime.protocol import Runtime
from .group import Group


def token_counts(own: tuple[int, int], like: Any, shares: Sequence[int] | None, kv_shares: Sequence[int] | None, group: Group,
                 runtime: Runtime) -> tuple[list[int], list[int]]:
    """(tokens of Q, tokens of K and V) of each rank of the group, as told, or as the others say.

    own: this rank's. like: a tensor where the question can travel.
    Raises ValueError where what was told is not what this rank has.
    """
    if shares is None:
        told = group.all_gather(runtime.from_numpy(np.array(own, np.int32), like, "int32"), runtime, "statistics")
        rows = [runtime.to_numpy(one).tolist() for one in told]
        return [row[0] for row in rows], [row[1] for row in rows]
    for name, count, told in (("shares", own[0], shares), ("kv_shares", own[1], kv_shares)):
        if len(told) != group.size or told[group.rank] != count:
            raise ValueError(f"{name} are {list(told)}, and rank {group.rank} of {group.size} was given {count} tokens")
    return list(shares), list(kv_shares)


def shared_statistics(found: Any, counts: tuple[list[int], list[int]], group: Group, inner: Any, options: AttentionOptions,
                      runtime: Runtime, meanwhile: Callable[[], object] | None = None) -> Any:
    """Statistics of all tokens of a group, and of the groups of the wrappers within, from those of this rank's.

    found: of `engine.codes.statistics`. counts: tokens of each rank. inner: what the group's wrapper wraps. meanwhile: to do
    while they travel.
    """
    if group.size > 1:
        everyone = group.all_gather(found, runtime, "statistics", meanwhile)
        stacked = runtime.concat([one.reshape([1, *runtime.shape(one)]) for one in everyone], 0)
        found = engine.combined(stacked, *counts, options, runtime)
    if hasattr(inner, "share_statistics"):
        found = inner.share_statistics(found, sum(counts[0]), sum(counts[1]), options, runtime)
    return found


def computed(parts: Sequence[Any], found: Any, counts: tuple[list[int], list[int]], group: Group, inner: Any,
             options: AttentionOptions, runtime: Runtime, *choices: bool) -> list[Any]:
    """Pieces of heads (`HeadsPart`, `KeysPart`) quantised, sent and computed: what each one's `compute(*choices)` gives.

    found: statistics of this rank's tokens, or None; Q is quantised while those of all are gathered, where it needs none.
    """
    if found is not None:
        found = shared_statistics(found, counts, group, inner, options, runtime,
                                  meanwhile=lambda: [part.quantise_q() for part in parts])
    for part in parts:
        part.send(found)
    return [part.compute(*choices) for part in parts]
