"""`Degrees` and `Mesh`: how the ranks of a run are shared out among guidance, heads, ring and decoding.

Ulysses' ranks are neighbours (they exchange most, so they should share a host), a ring links such groups, and guidance has
the whole twice: rank = (cfg * ring + place in the ring) * ulysses + place among the heads.
"""
from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from .group import Group, Traffic
from .wire import Wire


@dataclass(frozen=True)
class Degrees:
    """How many ways each thing is shared. cfg: 1, or 2 for the two halves of guidance; ulysses: heads; ring: keys;
    vae: ranks that decode, at most all.

    Raises ValueError for degrees that cannot be meant.
    """

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    vae: int = 1

    def __post_init__(self) -> None:
        for name, degree in asdict(self).items():
            if not isinstance(degree, int) or degree < 1:
                raise ValueError(f"the {name} degree is {degree!r}; it must be a whole number from 1 on")
        if self.cfg > 2:
            raise ValueError(f"the cfg degree is {self.cfg}; guidance has two halves: 1 or 2")
        if self.vae > self.ranks:
            raise ValueError(f"the vae degree is {self.vae}, and there are only {self.ranks} ranks (cfg x ulysses x ring)")

    @property
    def ranks(self) -> int:
        """How many ranks they need."""
        return self.cfg * self.ulysses * self.ring

    def __str__(self) -> str:
        parts = [f"{name} {degree}" for name, degree in asdict(self).items() if degree > 1]
        return " x ".join(parts[:3]) if parts else "one rank"


def ranks_of_a_host(size: int) -> int:
    """How many of `size` ranks are on one host, as the launcher says, else all."""
    return max(1, int(os.environ.get("PADDLE_LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or size))


def degrees_for(size: int, heads: int, cfg: int | None = None, ulysses: int | None = None, ring: int | None = None,
                vae: int | None = None, guided: bool = True, host_ranks: int | None = None) -> Degrees:
    """Degrees for `size` ranks; None is chosen: guidance first (only its result is exchanged), then heads, then the ring.

    heads: of the model's attention. guided: whether there is guidance to share. host_ranks: ranks on one host, beyond which
    heads are not shared; default: as the launcher says, else all.
    Raises ValueError where the degrees do not make `size` ranks, or more ranks than heads share the heads.
    """
    given = (cfg or 1) * (ulysses or 1) * (ring or 1)
    wanted = f"cfg {cfg or 'auto'} x ulysses {ulysses or 'auto'} x ring {ring or 'auto'}"
    if size % given:
        raise ValueError(f"{wanted} do not make {size} ranks; their product must be the number of processes launched")
    rest = size // given
    if cfg is None:
        cfg = 2 if guided and rest % 2 == 0 else 1
        rest //= cfg
    if ulysses is None:
        here = host_ranks or ranks_of_a_host(size)
        fits = [degree for degree in range(1, rest + 1)
                if rest % degree == 0 and degree <= heads and (degree <= here or ring is not None)]
        ulysses = fits[-1]
        rest //= ulysses
    if ring is None:
        ring, rest = rest, 1
    if rest != 1:
        raise ValueError(f"{wanted} do not make {size} ranks; their product must be the number of processes launched")
    if ulysses > heads:
        raise ValueError(f"ulysses {ulysses} shares {heads} heads: each rank needs at least one; use a ring for the rest")
    return Degrees(cfg, ulysses, ring, size if vae is None else vae)


class Mesh:
    """The groups of this process. cfg, ulysses, ring: those that share guidance, heads and keys with it; sequence: all that
    share its half of the tokens, in their order; world: all.

    Raises ValueError where the degrees do not make the wire's ranks.
    """

    def __init__(self, wire: Wire, degrees: Degrees) -> None:
        if degrees.ranks != wire.size:
            raise ValueError(f"{degrees} makes {degrees.ranks} ranks, and {wire.size} were launched")
        self.wire, self.degrees, self.traffic = wire, degrees, Traffic()
        u, r = degrees.ulysses, degrees.ring
        place, half = wire.rank % (u * r), wire.rank // (u * r)
        first = half * u * r
        group = lambda ranks: Group(wire, ranks, self.traffic)
        self.world = group(range(wire.size))
        self.sequence = group(range(first, first + u * r))
        self.ulysses = group(range(first + place // u * u, first + place // u * u + u))
        self.ring = group(range(first + place % u, first + u * r, u))
        self.cfg = group(range(place, wire.size, u * r))
