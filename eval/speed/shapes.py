"""Attention shapes to benchmark: [B, H, N, D] of video models' denoising steps, and sweeps over length."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One benchmark shape: batch, heads, tokens, head_dim; `name` says whose it is."""

    name: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    causal: bool = False

    @property
    def dims(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.tokens, self.head_dim

    @property
    def flops(self) -> float:
        """Operations of Q.K^T and P.V: 4 B H N^2 D, half of it under a causal mask."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        return f"({self.batch},{self.heads},{self.tokens},{self.head_dim}{',causal' if self.causal else ''})"


MODELS = (
    Shape("CogVideoX-2b", 2, 30, 17776, 64),
    Shape("CogVideoX-5b", 2, 48, 17776, 64),
    Shape("CogVideoX-1.5-5b", 2, 48, 45106, 64),
    Shape("Wan 2.1", 1, 40, 75600, 128),
    Shape("HunyuanVideo", 1, 24, 118806, 128),
)
ANCHORS = (
    Shape("32k", 1, 24, 32768, 128),
    Shape("8k", 4, 32, 8192, 128),
    Shape("4k", 4, 32, 4096, 64),
)
SWEEP = tuple(Shape("sweep", 128 // n, 256 // d, n * 1024, d) for d in (64, 128) for n in (1, 2, 4, 8, 16, 32, 64, 128))
"""1K to 128K tokens a sequence, 128K in all, so that every length fills the GPU; heads times head dim is 256."""
GROUPS = {"models": MODELS, "anchors": ANCHORS, "sweep": SWEEP}
QUICK = (MODELS[0], ANCHORS[0], ANCHORS[1])
"""The shapes of the acceptance table."""


def parse_shapes(text: str | None, quick: bool = False) -> tuple[Shape, ...]:
    """Shapes named by a string: groups ("models", "anchors", "sweep") and B,H,N,D[,causal] separated by ";".

    None: the models and anchors, or with `quick` the acceptance table's three. ValueError says what is not understood.
    """
    if text is None:
        return QUICK if quick else MODELS + ANCHORS
    shapes: list[Shape] = []
    for part in filter(None, (p.strip().strip("()") for p in text.split(";"))):
        named = [s for s in MODELS + ANCHORS if s.name.lower() == part.lower()]
        if part in GROUPS or named:
            shapes += GROUPS.get(part, named)
            continue
        fields = [f.strip() for f in part.split(",")]
        causal = fields[-1] == "causal"
        try:
            batch, heads, tokens, head_dim = map(int, fields[:-1] if causal else fields)
        except ValueError:
            raise ValueError(f"shape {part!r} is neither a group ({', '.join(GROUPS)}), a model "
                             f"({', '.join(s.name for s in MODELS)}) nor B,H,N,D or B,H,N,D,causal") from None
        shapes.append(Shape("", batch, heads, tokens, head_dim, causal))
    return tuple(shapes)
