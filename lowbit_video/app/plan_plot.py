"""The scaling of a plan as a picture: modelled lines, measured points marked apart."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..distributed.cost.figures import USUAL
from ..distributed.cost.split import Cost
from ..distributed.cost.task import Task
from ..files import write_whole
from ..installing import pip_install

STEPS = ("transformer", "step")
"""Of the things measured, those that are a step."""


def check_plot(path: str | Path) -> None:
    """Raises before anything is computed where the picture could not be written."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"--plot {path}: the picture is a PNG; give it a name that ends in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"--plot draws with matplotlib: {pip_install('eval')}, or leave out --plot")


def plot_scaling(task: Task, scaling: Sequence[Cost], compared: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws ms a step, and efficiency, over the number of GPUs; the best split by each number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    times, shares = figure.subplots(1, 2)
    gpus = [cost.degrees.ranks for cost in scaling]
    alone = scaling[0].step_ms
    steps = [cost.step_ms for cost in scaling]
    times.plot(gpus, [alone / count for count in gpus], color="0.6", linestyle=":", label="one GPU's time, shared evenly")
    times.plot(gpus, steps, color="tab:blue", linestyle="--", marker="o", markersize=4, markerfacecolor="white",
               label="modelled, best split")
    shares.plot(gpus, [100 * alone / cost.step_ms / cost.degrees.ranks for cost in scaling], color="tab:blue", linestyle="--",
                marker="o", markersize=4, markerfacecolor="white", label="modelled, best split")
    travels = {"exchange": task.exchange, "output": task.output}
    measured = [row for row in compared if row["what"] in STEPS
                and all(row.get(name, usual) == travels[name] for name, usual in USUAL.items())]
    first = {(row["what"], row["source"]): row["ms"] for row in measured if row["gpus"] == 1}
    if measured:
        marks = dict(color="tab:red", marker="D", linestyle="none", markersize=7, markerfacecolor="none", markeredgewidth=1.6,
                     label="measured")
        times.plot([row["gpus"] for row in measured], [row["ms"] for row in measured], **marks)
        over = [(row["gpus"], 100 * first[row["what"], row["source"]] / row["ms"] / row["gpus"],
                 _dotted(*(row.get(name, 1) for name in ("cfg", "ulysses", "ring"))))
                for row in measured if (row["what"], row["source"]) in first]
        shares.plot([count for count, _, _ in over], [share for _, share, _ in over], **marks)
        line = dict(color="tab:red", linewidth=1.2, label="measured, best split")
        times.plot(*_best([(row["gpus"], row["ms"]) for row in measured], min), **line)
        shares.plot(*_best([point[:2] for point in over], max), **line)
        for place, text in _beside(over):
            shares.annotate(text, place, textcoords="offset points", xytext=(-8, 0), ha="right", va="center", fontsize=7,
                            color="tab:red")
    for cost in scaling[1:]:
        d = cost.degrees
        shares.annotate(_dotted(d.cfg, d.ulysses, d.ring), (d.ranks, 100 * alone / cost.step_ms / d.ranks),
                        textcoords="offset points", xytext=(3, 5), ha="left", fontsize=7, color="0.3", rotation=35)
    times.set_yscale("log")
    times.set_ylabel("ms a step")
    times.set_yticks(ticks := _ticks(min(*steps, alone / gpus[-1]), alone), [f"{tick:g}" for tick in ticks])
    shares.set_ylabel("efficiency of a step, % (beside: cfg·ulysses·ring)")
    shares.set_ylim(0, 112)
    shares.set_xlim(0.8, 1.6 * gpus[-1])  # room for the last label
    for axis in (times, shares):
        axis.set_xscale("log", base=2)
        shown = [count for count in gpus if count & (count - 1) == 0]
        axis.set_xticks(shown, list(map(str, shown)))
        axis.minorticks_off()
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="lower left")
    figure.suptitle(f"{Path(task.model.name).name}, {task.tokens} tokens, {task.precision}; "
                    f"{task.figures.gpu.name}, {task.link}, {task.framework}" + ", as a CUDA graph" * task.cuda_graph,
                    fontsize=10)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _dotted(*degrees: int) -> str:
    return "·".join(map(str, degrees))


def _best(points: Sequence[tuple[int, float]], choose: Callable[[list[float]], float]) -> tuple[list[int], list[float]]:
    """(numbers of GPUs, the best of each)."""
    counts = sorted({count for count, _ in points})
    return counts, [choose([value for count, value in points if count == one]) for one in counts]


def _beside(points: Sequence[tuple[int, float, str]]) -> list[tuple[tuple[int, float], str]]:
    """(where, what) of labels of measured points on several GPUs; points too near for a label each have one together."""
    labels: list[tuple[tuple[int, float], str]] = []
    for count, share, split in sorted({point for point in points if point[0] > 1}):
        if labels and labels[-1][0][0] == count and share - labels[-1][0][1] < 3:
            labels[-1] = labels[-1][0], f"{split}\n{labels[-1][1]}"
        else:
            labels.append(((count, share), split))
    return labels


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... around these."""
    every = [base * 10.0**power for power in range(-2, 7) for base in (1, 2, 5)]
    return [tick for tick in every if low / 2 <= tick <= high * 1.5]
