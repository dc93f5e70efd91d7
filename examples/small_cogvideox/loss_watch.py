"""When a training has lost its way, and should take its last good weights back."""
from __future__ import annotations

import math

JUMP, WORSE = 3.0, 1.4
"""Times the best loss of this clip length: at once, and twice in a row. A mean over 50 steps of 8 clips was 1.4 times the
best without more to it about once in 1500 steps."""


class LossWatch:
    """Sees the mean losses of one clip length, one after another."""

    def __init__(self):
        self.best, self.above = math.inf, False

    def lost(self, mean: float) -> bool:
        """Whether this mean says so; a good one is remembered."""
        above = mean > WORSE * self.best
        lost = not math.isfinite(mean) or mean > JUMP * self.best or (above and self.above)
        self.above = above and not lost
        self.best = min(self.best, mean) if math.isfinite(mean) else self.best
        return lost
