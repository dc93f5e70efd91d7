"""The pooled rungs that a calibration may choose from, and what of a model must be known to name them."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lowbit_video.hook.frames.cogvideox import joint_attention
from lowbit_video.hook.processors import ExactAttnProcessor
from lowbit_video.kernels.pooled.tiles import POOLED_FROM
from lowbit_video.rung import pooled_rung

BESIDE = "int8+fp8"
"""The precision whose keys are pooled: the fastest that there is."""
SHARES = (0.2, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class PooledPlan:
    """Which pooled rungs may be chosen.

    shares: of the key tiles that are kept, each a rung; none: no pooled rungs. least: tokens from which there are any.
    """

    shares: tuple[float, ...] = SHARES
    least: int = POOLED_FROM

    def rungs(self, tokens: int, text: int) -> tuple[str, ...]:
        """The rungs of a model's attention over so many tokens, of which the first `text` are always kept."""
        return () if self.why_not(tokens) else tuple(pooled_rung(BESIDE, share, text) for share in self.shares)

    def why_not(self, tokens: int, by_bits: bool = False) -> str:
        """Why there are no pooled rungs, or nothing. by_bits: whether rungs cost their bits, not their time."""
        if not self.shares:
            return "no pooled rungs: not asked for"
        if by_bits:
            return "no pooled rungs: bits are counted, and keys that are pooled have none"
        if tokens < self.least:
            return (f"no pooled rungs: choosing what to pool costs more than it saves below {self.least} tokens ({tokens} "
                    "here)")
        return ""


class Look(ExactAttnProcessor):
    """Exact attention that remembers its latest call. tokens, head_dim; text: how many tokens are text and come first."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = self.text = self.head_dim = 0

    @functools.wraps(ExactAttnProcessor.__call__)  # diffusers passes what it finds in the signature
    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *given: Any, **named: Any) -> Any:
        out = super().__call__(attn, hidden_states, encoder_hidden_states, *given, **named)
        text_first = encoder_hidden_states is not None and attn.attention_slot.frame is joint_attention
        self.text = int(encoder_hidden_states.shape[1]) if text_first else 0
        return out

    def attend(self, q: Any, *given: Any, **named: Any) -> Any:
        """Exact attention."""
        self.tokens, self.head_dim = int(q.shape[1]), int(q.shape[3])
        return super().attend(q, *given, **named)


def rows_of_tiles(tokens: int, text: int, tile: int, rows: int, least: int = 8) -> tuple[list[slice], int]:
    """Query rows in whole tiles, so that pooled attention chooses for them as it does for all.

    tokens: of q, in tiles of `tile`. text: tokens at the beginning that see every key. rows: about how many, in `least` tiles
    at least.
    Returns the rows, those of the tiles with text and then others, evenly spaced; and how many the first ones are, which are
    there for their place alone.
    """
    first = -(-text // tile)
    others = range(first, -(-tokens // tile))
    if not others:
        return [slice(0, tokens)], 0
    count = min(len(others), max(least, -(-rows // tile)))
    picked = [others[int((at + 0.5) * len(others) / count)] for at in range(count)]
    taken = [slice(at * tile, min((at + 1) * tile, tokens)) for at in (*range(first), *picked)]
    return taken, min(first * tile, tokens)
