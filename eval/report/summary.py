"""From result lines to figures with intervals, and each beside the noise floor.

A figure's loss is its distance from what the exact run gives: for paired metrics the distance to a perfect pair (for PSNR
the root mean square error), for metrics of one video the absolute difference from the exact video of the same prompt.
"x times the floor" is the mean loss over prompts divided by that of the floor; its interval resamples prompts jointly.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..compare.candidates import EXACT, FLOOR
from ..metrics import registry
from .bootstrap import Interval, bootstrap, mean, ratio_of_means

CLEARLY = 2.0  # the lower end of the interval that calls a candidate clearly above the floor
WITHIN, ABOVE, CLEARLY_ABOVE, FAILED, UNKNOWN = "within the floor", "above the floor", "clearly above", "failed", "not known"


@dataclass(frozen=True)
class Cell:
    """One figure of one run.

    value: mean over prompts, with its interval. change: mean difference from the exact run (metrics of one video only).
    times_floor: mean loss over the floor's, or None without a floor. verdict: what that says.
    """

    value: Interval
    change: Interval | None = None
    times_floor: Interval | None = None
    verdict: str = UNKNOWN


@dataclass(frozen=True)
class Row:
    """One run (exact, floor, or a candidate) over all prompts; `seconds` is the median time of denoising, or of the call."""

    run: str
    videos: int
    failed: int
    seconds: float
    cells: dict[str, Cell]
    verdict: str = UNKNOWN
    attention: dict[str, int] = field(default_factory=dict)
    fallbacks: int = 0
    place: int = 0  # among the candidates; colours go by it


@dataclass(frozen=True)
class Summary:
    """The rows, exact first, then the floor, then candidates in the order they were asked for; and the figures' names."""

    rows: list[Row]
    figures: list[str]
    prompts: list[str]
    seeds: list[int]

    def row(self, run: str) -> Row:
        """The row of a run; KeyError where there is none."""
        return {row.run: row for row in self.rows}[run]


def figure_order(name: str) -> tuple:
    """Sorts figures as a reader meets them."""
    base, _, part = name.partition(".")
    return registry.metric(base).place, base, part == "all", part


def verdict_of(times: Interval | None) -> str:
    """What an interval of "times the floor" says; a single prompt, without an interval, says nothing."""
    if times is None or np.isnan(times.low):
        return UNKNOWN
    if times.low > CLEARLY:
        return CLEARLY_ABOVE
    return ABOVE if times.low > 1 else WITHIN


def summarise(videos: Sequence[dict], order: Sequence[str] = ()) -> Summary:
    """Summarise result lines (`Store.videos()`).

    Only prompts on which exact, floor and every other run are finished enter, so that all rows stand on the same prompts;
    a candidate that failed (NaN) on one keeps the prompts it managed and says how many failed.

    Args:
        videos: the lines of kind "video". order: runs in the order rows shall have; others follow.

    Raises:
        ValueError: no prompt has both its exact video and a candidate's.
    """
    runs = list(dict.fromkeys([EXACT, FLOOR, *order, *[v["run"] for v in videos]]))
    runs = [run for run in runs if any(v["run"] == run for v in videos)]
    by_key = {(v["prompt"], v["seed"], v["run"]): v for v in videos}
    pairs = [pair for pair in dict.fromkeys((v["prompt"], v["seed"]) for v in videos)
             if all((*pair, run) in by_key for run in runs)]
    if not pairs:
        raise ValueError("no prompt has all its videos yet; let `lowbit-video eval compare` finish one")
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    names = {name for key in by_key.values() for name in key.get("figures", {})}
    figures = sorted(names, key=figure_order)

    def per_prompt(run: str, figure: str, kind: str) -> dict[str, float]:
        """Mean over a prompt's seeds of the value, the change from exact, or the loss."""
        metric, out = registry.metric(figure), {}
        for prompt in prompts:
            values = []
            for seed in [s for p, s in pairs if p == prompt]:
                value = by_key[prompt, seed, run].get("figures", {}).get(figure)
                exact = by_key[prompt, seed, EXACT].get("figures", {}).get(figure)
                if value is None or (kind != "value" and exact is None and metric.kind != "paired"):
                    continue
                values.append(value if kind == "value" else value - exact if kind == "change" else metric.loss(value, exact))
            if values:
                out[prompt] = float(np.mean(values))
        return out

    def cell(run: str, figure: str) -> Cell | None:
        values = per_prompt(run, figure, "value")
        if not values:
            return None
        change = times = None
        if run != EXACT and registry.metric(figure).kind != "paired":
            changes = per_prompt(run, figure, "change")
            change = bootstrap(mean, list(changes.values())) if changes else None
        if run not in (EXACT, FLOOR) and FLOOR in runs:
            own, floor = per_prompt(run, figure, "loss"), per_prompt(FLOOR, figure, "loss")
            shared = [p for p in own if p in floor]
            if shared:
                times = bootstrap(ratio_of_means, [own[p] for p in shared], [floor[p] for p in shared])
        return Cell(bootstrap(mean, list(values.values())), change, times, verdict_of(times))

    rows = []
    for run in runs:
        lines = [by_key[(*pair, run)] for pair in pairs]
        cells = {figure: made for figure in figures if (made := cell(run, figure))}
        cells |= set_cells(run, runs, lines, pairs, by_key)
        failed = sum("error" in line for line in lines)
        attention: dict[str, int] = {}
        for line in lines:
            for variant, calls in line.get("attention", {}).items():
                attention[variant] = attention.get(variant, 0) + calls
        paired = [c.verdict for name, c in cells.items() if registry.metric(name).kind == "paired"]
        rank = [UNKNOWN, WITHIN, ABOVE, CLEARLY_ABOVE]
        verdict = FAILED if failed else max(paired, key=rank.index, default=UNKNOWN)
        seconds = [line.get("timings", {}).get("denoise", line["seconds"]) for line in lines if "seconds" in line]
        rows.append(Row(run, len(lines), failed, float(np.median(seconds)) if seconds else float("nan"), cells, verdict,
                        attention, max((line.get("fallbacks", 0) for line in lines), default=0), max(len(rows) - 2, 0)))
    for row in rows:
        figures += [name for name in row.cells if name not in figures]
    return Summary(rows, sorted(figures, key=figure_order), prompts, sorted({seed for _, seed in pairs}))


def set_cells(run: str, runs: list[str], lines: list[dict], pairs: list[tuple], by_key: dict) -> dict[str, Cell]:
    """Figures of whole sets (a Frechet distance between this run's features and the exact run's); no interval is claimed."""
    cells = {}
    if run == EXACT:
        return cells
    for name in {n for line in lines for n in line.get("features", {})}:
        distance = registry.metric(name).module.measure
        exact = [by_key[(*pair, EXACT)]["features"][name] for pair in pairs]
        own = [line["features"][name] for line in lines if name in line.get("features", {})]
        if min(len(own), len(exact)) < 2:
            continue
        nothing = float("nan")
        cells[name] = Cell(Interval(distance(own, exact), nothing, nothing, len(own)))
    return cells
