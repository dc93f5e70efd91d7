"""The curve of `evaluate_precisions.py`: quality over the share of keys that is kept, recipes against one share everywhere."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from lowbit_video.eval.calibrate.pooled import Look
from lowbit_video.eval.compare.candidates import Candidate
from lowbit_video.files import write_whole
from lowbit_video.hook.apply import apply
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.precision import names_recipe
from lowbit_video.rung import as_rung

FIGURES = ("psnr", "ssim")
EVERYTHING = "all"


def kept_shares(maker, runs: list[Candidate], caption: str, noise, steps: int) -> dict[str, float]:
    """What share of all pairs of a query tile and a key tile each precision or recipe keeps; 1 where nothing is pooled.

    One step of one caption says how many tokens there are, if some run pools.
    """
    rungs = {}
    for run in runs:
        wanted = run.make()
        if isinstance(wanted, str):
            rungs[run.label] = [wanted]
        elif isinstance(wanted, Recipe):
            plans = wanted.resolve(maker.pipe).layers.values()
            rungs[run.label] = [rung for plan in plans for step in range(steps) for rung in plan.at(step / steps).rungs]
    seen = Look()
    if any(as_rung(rung)[1] for own in rungs.values() for rung in own):
        with apply(maker.pipe, seen):
            maker.make(caption, noise, 1)

    def share_of(rung: str) -> float:
        pooled = as_rung(rung)[1]
        if pooled is None or pooled.all_kept:
            return 1.0
        kept, left = pooled.tiles(1, 1, seen.tokens, seen.tokens, seen.head_dim)
        return kept / (kept + left)

    return {label: float(np.mean([share_of(rung) for rung in own])) for label, own in rungs.items()}


def curve_of(record: dict) -> dict[str, dict[str, list[dict]]]:
    """Of all captions and of each kind of background: recipes, and precisions by name, each a list of runs by what they keep.

    A run has its label, the share that it keeps, and each of FIGURES with its interval.
    """
    kept = record["kept"]
    groups = {EVERYTHING: record["rows"], **{name: group["rows"] for name, group in record["groups"].items()}}
    curve: dict[str, dict[str, list[dict]]] = {}
    for name, rows in groups.items():
        curve[name] = {}
        for run in sorted((run for run in rows if run in kept), key=kept.get):
            series = "recipes" if names_recipe(run) else str(as_rung(run)[0])
            figures = {figure: rows[run][figure] for figure in FIGURES if figure in rows[run]}
            curve[name].setdefault(series, []).append({"run": run, "kept": kept[run], **figures})
    return curve


def plot_curve(path: Path, curve: dict, title: str) -> None:
    """A panel for all captions and one for each kind of background: PSNR over the share kept, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(curve))
    lines = -(-len(curve) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    for spare in axes[len(curve):]:
        spare.set_visible(False)
    for panel, (group, series) in zip(axes, curve.items()):
        for name, runs in series.items():
            runs = [run for run in runs if "psnr" in run]
            if not runs:
                continue
            values = np.array([run["psnr"]["value"] for run in runs])
            low, high = (np.array([run["psnr"]["value"] if run["psnr"][end] is None else run["psnr"][end] for run in runs])
                         for end in ("low", "high"))
            panel.errorbar([100 * run["kept"] for run in runs], values, [values - low, high - values], capsize=2, markersize=4,
                           marker="*" if name == "recipes" else "o", label=name if name == "recipes" else f"{name} everywhere")
        panel.set_title(f"{group} background" if group != EVERYTHING else "all captions", fontsize=9)
        panel.set_xlabel("pairs of tiles kept, %")
        panel.set_ylabel("PSNR, dB")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
