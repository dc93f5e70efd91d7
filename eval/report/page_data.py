"""The data that the page's script draws from: runs, prompts with their figures, and the layer table."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..compare.candidates import EXACT
from ..compare.layer_table import LayerTable
from ..metrics import registry
from .charts import colour_of
from .data import Report
from .films import Reel
from .text import digits, label_of

WORST_SHARES = 6


def page_data(report: Report, reels: Mapping[tuple, Reel]) -> dict:
    """Runs, prompts with their figures and films, the figures' names, and the layer table."""
    summary = report.summary
    figures = {}
    for figure in summary.figures:
        metric = registry.metric(figure)
        figures[figure] = {"label": label_of(figure), "unit": metric.unit, "digits": digits(figure),
                           "higher_is_better": metric.higher_is_better, "per_prompt": metric.kind != "set"}
    ranked = sorted(report.candidates(), key=lambda row: row.cells["psnr"].value.value if "psnr" in row.cells else math.inf)
    worst = ranked[0].run if ranked else EXACT
    return {"runs": [{"name": row.run, "colour": colour_of(row)} for row in summary.rows],
            "prompts": [prompt_data(report, i, pair, reels.get(pair)) for i, pair in enumerate(report.pairs())],
            "figures": figures, "default_b": worst, "many_seeds": len(summary.seeds) > 1, "fps": report.run["settings"]["fps"],
            "prompts_sort": {"key": worst, "up": True, "figure": "psnr" if "psnr" in figures else next(iter(figures), "")},
            "layers": layers_data(report.layers) if report.layers else None}


def prompt_data(report: Report, index: int, pair: tuple[str, int], reel: Reel | None) -> dict:
    """One prompt and seed: each run's figures, PSNR by frame, and where the film has it."""
    runs = {}
    for row in report.summary.rows:
        line = report.videos.get((*pair, row.run))
        if line:
            runs[row.run] = {"figures": line.get("figures", {})}
            if psnr := line.get("frames", {}).get("psnr"):
                runs[row.run]["frames"] = {"psnr": [round(x, 2) for x in psnr]}
            if "error" in line:
                runs[row.run]["error"] = line["error"]
    entry = {"index": index, "text": pair[0], "seed": pair[1], "runs": runs}
    if reel:
        entry |= {"thumbnail": reel.thumbnail, "frames": reel.frames}
        entry["reel"] = {"runs": reel.runs, "columns": reel.columns, "width": reel.width, "height": reel.height}
    return entry


def layers_data(layer_table: LayerTable) -> dict:
    """The layer table for the script: reduced over heads, and over steps, rounded."""
    figures = {"share": {"label": "share of the error", "unit": "", "share": True, "higher_is_better": False}}
    for name in layer_table.errors:
        if name != "squared_error":
            metric = registry.metric(name)
            figures[name] = {"label": label_of(name), "unit": metric.unit, "share": False,
                             "higher_is_better": metric.higher_is_better}
    values, worst, total = {}, {}, {}
    for c, candidate in enumerate(layer_table.candidates):
        values[candidate] = {}
        for name in figures:
            array = layer_table.of(candidate, name)  # [L, S, H]
            reduce = np.sum if name == "share" else registry.metric(name).reduce
            values[candidate][name] = {"steps": rounded(reduce(array, axis=2)), "heads": rounded(reduce(array, axis=1))}
        worst[candidate] = layer_table.worst(candidate, WORST_SHARES)
        error, floor = 100 * layer_table.latent_error[c], 100 * layer_table.floor_error
        total[candidate] = "" if np.isnan(error) else (
            f"Everywhere at {candidate}, the final latent is off by {error:.3g} % (relative L2); the floor is {floor:.2g} %.")
    return {"names": layer_table.layers, "short": short_names(layer_table.layers), "figures": figures, "values": values,
            "worst": worst, "total": total}


def rounded(array: np.ndarray) -> list:
    """Nested lists of four significant digits."""
    return [[float(f"{value:.4g}") for value in row] for row in array]


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without what all share: "transformer_blocks.7.attn1" is "layer 7" where only the number differs."""
    numbers = [[piece for piece in name.split(".") if piece.isdigit()] for name in names]
    if all(len(n) == 1 for n in numbers) and len({n[0] for n in numbers}) == len(names):
        return [f"layer {n[0]}" for n in numbers]
    return [name if len(name) < 22 else "…" + name[-20:] for name in names]
