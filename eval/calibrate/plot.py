"""The picture of a calibration: error over cost with the chosen point, and what each layer pays in each range of steps."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend goes first

from lowbit_video.files import write_whole  # noqa: E402

from .solve import MOST_DB, Allocation, db  # noqa: E402


def plot(path: str | os.PathLike, allocation: Allocation, uniform: Mapping[str, tuple[float, float]], paid: np.ndarray,
         layers: Sequence[str], ranges: Sequence[str], title: str, unit: str) -> None:
    """Writes a PNG.

    uniform: (cost, squared error) of each rung everywhere. paid: [L, G], mean cost of a layer's heads. layers, ranges:
    their names. unit: of costs.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    known = [(cost, db(error)) for cost, error in allocation.curve if db(error) < MOST_DB]
    left.plot(*zip(*known), color="tab:blue", drawstyle="steps-post", label="recipes")
    for rung, (cost, error) in uniform.items():
        if db(error) < MOST_DB:
            left.plot(cost, db(error), "o", color="tab:gray", markersize=4)
            left.annotate(rung, (cost, db(error)), fontsize=7, xytext=(4, -8), textcoords="offset points")
    if db(allocation.error) < MOST_DB:
        left.plot(allocation.cost, db(allocation.error), "*", color="tab:red", markersize=13, label="chosen")
    left.set_xlabel(unit)
    left.set_ylabel("predicted, dB of the final latent")
    left.legend(fontsize=8)
    image = right.imshow(paid, aspect="auto", cmap="viridis")
    right.set_yticks(range(len(layers)), layers, fontsize=6)
    right.set_xticks(range(len(ranges)), ranges, fontsize=7)
    right.set_xlabel("share of the denoising")
    figure.colorbar(image, ax=right, label=unit)
    figure.suptitle(title, fontsize=9)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
