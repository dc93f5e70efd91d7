"""What a report is made from: the results of `compare` summarised, the layer table, and speeds, read from their files."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from lowbit_video.files import read_json

from ..compare.candidates import EXACT, FLOOR
from ..compare.layer_table import FILE as LAYERS_FILE
from ..compare.layer_table import LayerTable
from ..compare.store import Store
from .groups import by_group
from .summary import Row, Summary, summarise

PAGE, MARKDOWN, PICTURE = "report.html", "report.md", "report.png"


@dataclass
class Report:
    """Everything the page shows; `load` gathers it.

    videos: result lines by (prompt, seed, run). run: the latest line that says how they were made. speed: {run: figure},
    named by `speed_label`; either seconds of this evaluation or speed-ups of a benchmark (`faster_is_higher`). groups: the
    summary of each group of prompts, where the lines say one.
    """

    summary: Summary
    videos: dict[tuple, dict]
    run: dict
    folder: Path
    layers: LayerTable | None = None
    speed: dict[str, float] = field(default_factory=dict)
    speed_label: str = "seconds a video"
    faster_is_higher: bool = False
    groups: dict[str, Summary] = field(default_factory=dict)

    @property
    def on_reference(self) -> bool:
        """Whether the times shown are those of the NumPy reference, which are not a speed."""
        ran = [variant for row in self.candidates() for variant in row.attention]
        return not self.faster_is_higher and any("(reference" in variant for variant in ran)

    @property
    def floor(self) -> str:
        """What the floor run was: what the run line says of it, else what `compare` makes."""
        return self.run.get("floor", "the exact run once more, which reads the keys in another order and splits the batch")

    def candidates(self) -> list[Row]:
        """The rows that are neither exact nor the floor."""
        return [row for row in self.summary.rows if row.run not in (EXACT, FLOOR)]

    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of the summary."""
        return [(p, s) for p in self.summary.prompts for s in self.summary.seeds if (p, s, EXACT) in self.videos]


def load(folder, *, speed=None, speed_shape=None, layers=None) -> Report:
    """Read a folder of results.

    Args:
        folder: of `compare`. speed: the JSON of `lowbit-video bench`, whose speed-ups then stand beside the quality.
        speed_shape: see `read_speed`. layers: a layer table; by default the folder's layers.npz, if there is one.

    Raises:
        FileNotFoundError, ValueError: no results, nothing finished, or a speed file without usable rows.
    """
    store = Store(folder, write=False)
    videos, runs = store.videos(), store.runs()
    if not runs or not videos:
        raise ValueError(f"{store.path}: no finished video yet")
    order = list(dict.fromkeys(name for run in runs for name in run["runs"]))
    summary = summarise(videos, order)
    table = Path(layers) if layers else Path(folder) / LAYERS_FILE
    report = Report(summary, {(v["prompt"], v["seed"], v["run"]): v for v in videos}, runs[-1], Path(folder),
                    groups=by_group(videos, order))
    if layers or table.is_file():
        report.layers = LayerTable.load(table)
    if any("timings" in video for video in videos):
        report.speed_label = "denoising seconds a video"
    report.speed = {row.run: row.seconds for row in summary.rows if not math.isnan(row.seconds)}
    if speed:
        report.speed, report.speed_label = read_speed(speed, speed_shape)
        report.faster_is_higher = True
    if report.on_reference:
        report.speed_label += ", CPU reference, not a speed"
    return report


def read_speed(path, shape: str | None = None) -> tuple[dict[str, float], str]:
    """Speed-ups over the benchmark's own baseline from its JSON: ({run: speed-up}, label).

    "exact" is the best exact attention among the rows with a precision, else the baseline itself.

    Args:
        shape: the shape's name in the benchmark; by default the one with the most tokens. For each precision its fastest
            variant is taken.

    Raises:
        ValueError: no row with a precision and a speed-up, or none of that shape (lists those there are).
    """
    content = read_json(path)
    given = content.get("rows")
    given = [r for r in given if isinstance(r, dict)] if isinstance(given, list) else []
    rows = [r for r in given if isinstance(r.get("precision"), str) and isinstance(r.get("speedup"), (int, float))
            and isinstance(r.get("tokens"), int) and not r.get("error")]
    if not rows:
        raise ValueError(f"{path}: no row with a precision and a speedup; give the JSON of `lowbit-video bench`")
    if shape:
        there = sorted({str(r.get("shape")) for r in rows})
        rows = [r for r in rows if r.get("shape") == shape]
        if not rows:
            raise ValueError(f"{path}: no shape {shape!r} in it; there are: {', '.join(there)}")
    tokens = max(r["tokens"] for r in rows)
    speed = {EXACT: 1.0}
    for row in rows:
        if row["tokens"] == tokens:
            speed[row["precision"]] = max(row["speedup"], speed.get(row["precision"], 0.0))
    about = content.get("about")
    about = about if isinstance(about, dict) else {}
    baselines = {str(r["method"]) for r in given if r.get("speedup") == 1 and r.get("method")}
    over = f" over {baselines.pop()}" if len(baselines) == 1 else ""
    gpu = about.get("gpu") or about.get("device") or "GPU"
    return speed, f"attention speed-up{over}, {gpu}, {shape + ', ' if shape else ''}{tokens} tokens"
