"""The layer table: every candidate's error by layer, step and head, and its share of what reaches the final latent."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowbit_video.files import write_whole

from ..metrics import registry

FILE = "layers.npz"
DETAIL = ("share", "squared_error")  # arrays of the same shape as the metrics


@dataclass(frozen=True)
class LayerTable:
    """The table, as `load` gives it; later choices of bit width per layer read this.

    candidates [C], layers [L]: names. errors: metric -> [C, L, S, H] over steps and heads (mean over calls in a step),
    and "squared_error". share: [C, L, S, H], each candidate's part sums to 1. latent_error [C]: relative L2 error of the
    final latent with the candidate everywhere. layer_error [C, L], step_error [C, G]: the same with the candidate in one
    layer, or in one group of steps, only (NaN where not measured). floor_error: of the exact twin. about: settings,
    prompt, seed, machine.
    """

    candidates: list[str]
    layers: list[str]
    errors: dict[str, np.ndarray]
    share: np.ndarray
    latent_error: np.ndarray
    layer_error: np.ndarray
    step_error: np.ndarray
    floor_error: float
    about: dict

    def of(self, candidate: str, figure: str = "share") -> np.ndarray:
        """[L, S, H] of one candidate: "share", "squared_error", or a metric's name.

        Raises:
            KeyError: no such candidate or figure (lists what exists).
        """
        if candidate not in self.candidates:
            raise KeyError(f"no candidate {candidate!r} in this table; there are: {', '.join(self.candidates)}")
        if figure != "share" and figure not in self.errors:
            raise KeyError(f"no figure {figure!r} in this table; there are: share, {', '.join(self.errors)}")
        return (self.share if figure == "share" else self.errors[figure])[self.candidates.index(candidate)]

    def by_layer(self, candidate: str, figure: str = "share") -> dict[str, float]:
        """One value a layer: the sum of shares, or the mean of a metric over steps and heads."""
        values = self.of(candidate, figure)
        reduced = values.sum(axis=(1, 2)) if figure in DETAIL else values.mean(axis=(1, 2))
        return dict(zip(self.layers, reduced.tolist()))

    def worst(self, candidate: str, count: int = 5) -> list[tuple[str, int, int, float]]:
        """The (layer, step, head, share) with the largest shares."""
        share = self.of(candidate)
        order = np.argsort(share, axis=None)[::-1][:count]
        places = zip(*np.unravel_index(order, share.shape))
        return [(self.layers[layer], int(step), int(head), float(share[layer, step, head])) for layer, step, head in places]

    def choose(self, limit: float, figure: str = "relative_l1", order: Sequence[str] | None = None) -> dict[str, str]:
        """For each layer the first candidate whose mean error is within the limit; a layer without one stays exact.

        Args:
            limit: at most this (at least this, for a metric where higher is better). order: candidates, cheapest first.

        Returns:
            {module name: candidate}, as `lowbit_video.apply(pipe, None, modules=...)` takes it.
        """
        higher = registry.metric(figure).higher_is_better
        chosen = {}
        for candidate in order or self.candidates:
            for layer, value in self.by_layer(candidate, figure).items():
                if layer not in chosen and (value >= limit if higher else value <= limit):
                    chosen[layer] = candidate
        return chosen

    def save(self, path) -> None:
        """Write one compressed npz, float32, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as part, open(part, "wb") as file:
            np.savez_compressed(
                file, candidates=np.array(self.candidates), layers=np.array(self.layers), share=self.share.astype(np.float32),
                latent_error=self.latent_error, layer_error=self.layer_error, step_error=self.step_error,
                floor_error=self.floor_error, about=json.dumps(self.about),
                **{f"error_{name}": array.astype(np.float32) for name, array in self.errors.items()})

    @classmethod
    def load(cls, path) -> LayerTable:
        """Read a table.

        Raises:
            FileNotFoundError: no such file. ValueError: an npz that is not a layer table.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if "share" not in arrays or "about" not in arrays:
            raise ValueError(f"{path}: not a layer table; make one with `lowbit-video eval layers`")
        errors = {name[6:]: array for name, array in arrays.items() if name.startswith("error_")}
        return cls(arrays["candidates"].tolist(), arrays["layers"].tolist(), errors, arrays["share"], arrays["latent_error"],
                   arrays["layer_error"], arrays["step_error"], float(arrays["floor_error"]), json.loads(str(arrays["about"])))


def as_text(table: LayerTable) -> str:
    """The table for a terminal: a row a layer, and for each candidate its SQNR (mean over steps and heads) and share."""
    width = max(len(name) for name in [*table.layers, "final latent error"])
    head = f"{'layer':<{width}}" + "".join(f"  {name:>22}" for name in table.candidates)
    lines = [head, f"{'':<{width}}" + "".join(f"  {'SQNR dB':>13}{'share':>9}" for _ in table.candidates)]
    for layer in table.layers:
        cells = ""
        for candidate in table.candidates:
            sqnr, share = table.by_layer(candidate, "sqnr")[layer], table.by_layer(candidate)[layer]
            cells += f"  {sqnr:>13.1f}{100 * share:>8.1f}%"
        lines.append(f"{layer:<{width}}{cells}")
    if not np.isnan(table.latent_error).all():
        lines.append(f"{'final latent error':<{width}}" + "".join(f"  {100 * e:>21.3f}%" for e in table.latent_error)
                     + f"   (floor {100 * table.floor_error:.2g} %)")
    for candidate in table.candidates:
        layer, step, head_index, share = table.worst(candidate, 1)[0]
        lines.append(f"{candidate}: the largest share, {100 * share:.1f} %, is {layer}, step {step}, head {head_index}")
    return "\n".join(lines)
