"""Plots of a kernel benchmark."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend goes first

from lowbit_video.files import write_whole  # noqa: E402


def plot_kernels(rows: list[Any], about: dict[str, Any], path: Path) -> Path:
    """Bars of total TFLOP/s by method, one panel a shape; sweeps over length become one panel of lines per head dim."""
    sweeps = [r for r in rows if r.shape == "sweep" and r.tflops]
    bars = [r for r in rows if r.shape != "sweep" and r.tflops]
    keys = list(dict.fromkeys((r.shape, r.batch, r.heads, r.tokens, r.head_dim) for r in bars))
    dims = sorted({r.head_dim for r in sweeps})
    panels = len(keys) + len(dims)
    columns = min(3, max(1, panels))
    lines = -(-max(1, panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.6 * lines), squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for axis, key in zip(flat, keys):
        here = [r for r in bars if (r.shape, r.batch, r.heads, r.tokens, r.head_dim) == key]
        colours = ["tab:gray" if r.precision in (None, "exact") else "tab:blue" for r in here]
        axis.barh([r.method for r in here], [r.tflops for r in here], color=colours)
        kernels = [(i, r.kernel_tflops) for i, r in enumerate(here) if r.kernel_tflops]
        axis.plot([t for _, t in kernels], [i for i, _ in kernels], "k|", markersize=9, label="kernel only")
        axis.set_title(f"{key[0]} ({', '.join(map(str, key[1:]))})", fontsize=9)
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.set_xlabel("TFLOP/s, quantisation counted", fontsize=8)
    colours = {method: f"C{i % 10}" for i, method in enumerate(dict.fromkeys(r.method for r in sweeps))}
    lines_of = {}
    for axis, dim in zip(flat[len(keys):], dims):
        for method in dict.fromkeys(r.method for r in sweeps if r.head_dim == dim):
            points = sorted((r.tokens, r.tflops) for r in sweeps if r.head_dim == dim and r.method == method)
            lines_of[method], = axis.plot(*zip(*points), colours[method], marker="o", markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_title(f"head dim {dim}", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("TFLOP/s, quantisation counted", fontsize=8)
        axis.set_ylim(bottom=0)
    if lines_of:  # below the panels, where it hides no line
        figure.legend(lines_of.values(), lines_of, loc="outside lower center", ncols=4, fontsize=7)
    for axis in flat[panels:]:
        axis.set_visible(False)
    figure.suptitle(f"{about['gpu']}, {about['framework']} tensors, commit {about['commit']}", fontsize=9)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
    return path
