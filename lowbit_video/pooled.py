"""`Pooled`: which part of an attention call's keys runs at its precision, while the rest is pooled."""
from __future__ import annotations

import functools
from dataclasses import dataclass, field

from lowbit_video.kernels.pooled.tiles import counted_tiles

from .arguments import number, shown, whole


@dataclass(frozen=True)
class Pooled:
    """Pooled attention: a tile of queries takes a share of the tiles of 128 keys as they are, and every other tile as one key.

    A pooled key is the mean of its tile's keys, weighs as much as all of them, and has the mean of their values. Each tile of
    queries (192 rows up to head dim 64, else 128) keeps those whose pooling would cost it most. Keys that are near each other
    in the sequence should be alike.
    keep: the share of key tiles that is kept, 0 to 1, rounded up to whole tiles; one number, or a tuple of one a query head.
    always: so many tokens at the beginning (text) are never pooled: as keys every query sees them, and as queries they see
        every key. Kept tiles of theirs count towards the share, as does the last tile, which is always kept.

    Raises TypeError for what is no number, ValueError for a share outside of 0 to 1 or a negative count.
    """

    keep: float | tuple[float, ...]
    always: int = 0
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        many = isinstance(self.keep, (list, tuple))
        shares = tuple(_share(share) for share in (self.keep if many else (self.keep,)))
        if not shares:
            raise ValueError("keep is empty; give a share of the key tiles, such as 0.3, or one for each head")
        object.__setattr__(self, "keep", shares if many else shares[0])
        object.__setattr__(self, "always", whole("always", self.always, 0))
        # made here: what traces a call into a graph cannot write a tuple down
        object.__setattr__(self, "text", f"({self.keep!r}, {self.always!r})")

    def of_heads(self, heads: int) -> tuple[float, ...]:
        """The share of each query head. Raises ValueError where there are others than that many."""
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,) * heads
        if len(shares) != heads:
            raise ValueError(f"keep has {len(shares)} shares, and q has {heads} heads; give one number, or one for each head")
        return shares

    def tiles(self, batch: int, heads: int, q_len: int, kv_len: int, head_dim: int) -> tuple[int, int]:
        """How many pairs of a query tile and a key tile a call of that shape keeps, and how many it pools.

        Raises ValueError as `of_heads`.
        """
        return _tiles(self, batch, heads, q_len, kv_len, head_dim)

    @property
    def all_kept(self) -> bool:
        """Whether nothing is pooled: then it is attention as without this."""
        return min(self.keep) == 1 if isinstance(self.keep, tuple) else self.keep == 1

    def __str__(self) -> str:
        kept = f"{min(self.keep):g}-{max(self.keep):g}" if isinstance(self.keep, tuple) else f"{self.keep:g}"
        return f"pooled {kept}"


@functools.lru_cache(maxsize=256)  # a model's calls are alike
def _tiles(pooled: Pooled, batch: int, heads: int, q_len: int, kv_len: int, head_dim: int) -> tuple[int, int]:
    counts = [counted_tiles(share, pooled.always, q_len, kv_len, head_dim) for share in pooled.of_heads(heads)]
    return batch * sum(kept for kept, _ in counts), batch * sum(left for _, left in counts)


def _share(given: object) -> float:
    share = number("keep", given)
    if not 0 <= share <= 1:
        raise ValueError(f"keep is {share:g}; give a share of the key tiles, 0 to 1")
    return share


def as_pooled(given: object) -> Pooled | None:
    """A Pooled from itself; None stays None. TypeError for anything else."""
    if given is None or isinstance(given, Pooled):
        return given
    raise TypeError(f"pooled is {shown(given)}; give None, or Pooled(keep=0.3)")
