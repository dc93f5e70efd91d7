"""The PNG for a README: frames of one prompt, quality with intervals, and speed beside quality, drawn with matplotlib."""

from __future__ import annotations

import io
import math
import textwrap

from ..compare.candidates import EXACT, FLOOR
from ..metrics import registry
from ..video import BadVideoError, read_video
from .charts import frontier
from .data import Report
from .labels import Point, name_points

PALETTE = ("#0b63ce", "#c2570c", "#0f8a6d", "#9c3fae", "#8a6d00", "#c0325b", "#3f6f8f", "#5b5bd6")
INK, SOFT, LINE = "#1c1e21", "#5d636b", "#e2e0da"
FIGURES = ("psnr", "ssim")


def draw_picture(report: Report) -> bytes:
    """A PNG, 150 dots an inch, on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = report.summary
    rows = [row for row in summary.rows if row.run != EXACT]
    candidates = [row for row in rows if row.run != FLOOR]
    colours = {row.run: PALETTE[i % len(PALETTE)] for i, row in enumerate(candidates)} | {FLOOR: "#8b919a", EXACT: INK}
    strip = frames_of(report)
    figure = Figure(figsize=(11, 3.9 + (1.9 if strip else 0)), facecolor="white")
    FigureCanvasAgg(figure)
    heights = [1.25, 2.6] if strip else [1]
    longest = min(24, max(map(len, ["noise floor", *(row.run for row in rows)])))
    outer = figure.add_gridspec(
        len(heights), 1, height_ratios=heights, left=0.03 + 0.0078 * longest, right=0.985, top=0.9 if strip else 0.83,
        bottom=0.15, hspace=0.28,
    )
    figure.text(0.015, 0.965, "Does the video stay the same?", fontsize=14, fontweight="bold", color=INK, va="center")
    if strip:
        prompt, shots = strip
        figure.text(0.985, 0.965, wrapped(f"“{prompt}”", 92), fontsize=8.5, color=SOFT, ha="right", va="center")
        inner = outer[0].subgridspec(1, len(shots), wspace=0.04)
        size = min(9.5, 5 + 160 / len(shots) / max(len(run) for run, _ in shots))
        for i, (run, frame) in enumerate(shots):
            axes = figure.add_subplot(inner[i])
            axes.imshow(frame)
            axes.set_axis_off()
            axes.set_title(run, fontsize=size, color=colours.get(run, INK), fontweight="bold", pad=4)
    inner = outer[-1].subgridspec(1, 3, wspace=0.3, width_ratios=[1, 1, 1.25])
    shown = [registry.metric(name) for name in FIGURES if any(name in row.cells for row in rows)]
    for i, metric in enumerate(shown):
        axes = styled(figure.add_subplot(inner[i]), ", ".join(filter(None, (metric.label, metric.unit))))
        for y, row in enumerate(rows):
            if metric.name not in row.cells:
                continue
            value, colour = row.cells[metric.name].value, colours[row.run]
            if not math.isnan(value.low):
                axes.plot([value.low, value.high], [y, y], color=colour, lw=2, solid_capstyle="round")
            axes.plot(value.value, y, "o", color=colour, ms=6)
            digits = min(metric.digits, 3)  # there is room for three
            axes.annotate(
                f"{value.value:.{digits}f}",
                (value.value, y),
                xytext=(0, 7),
                textcoords="offset points",
                fontsize=8,
                ha="center",
                color=SOFT,
            )
        axes.set_yticks(
            range(len(rows)), [("noise floor" if r.run == FLOOR else r.run) if i == 0 else "" for r in rows], fontsize=9
        )
        axes.set_ylim(len(rows) - 0.5, -0.7)
        axes.margins(x=0.12)
    axes = styled(figure.add_subplot(inner[2]), "PSNR, dB, and " + ("speed" if report.faster_is_higher else "time"))
    axes.set_xlabel(wrapped(report.speed_label), fontsize=8, color=SOFT)
    points = [
        (row, report.speed[row.run], row.cells["psnr"].value)
        for row in candidates
        if row.run in report.speed and "psnr" in row.cells
    ]
    best = frontier([(s, v.value) for _, s, v in points], report.faster_is_higher)
    if not report.on_reference:
        axes.plot([p[0] for p in best], [p[1] for p in best], "--", color="#0b63ce", lw=1, alpha=0.6)
    speeds = [speed for _, speed, _ in points]
    named = []
    for row, speed, value in points:
        low, high = (value.value, value.value) if math.isnan(value.low) else (value.low, value.high)
        axes.plot([speed, speed], [low, high], color=colours[row.run], lw=2, solid_capstyle="round")
        named.append(Point(row.run, speed, value.value, low, high))
        axes.plot(speed, value.value, "o", color=colours[row.run], ms=7)
    axes.margins(y=0.2)
    if points:
        room = (max(speeds) - min(speeds)) or max(speeds)
        axes.set_xlim(min(speeds) - 0.15 * room, max(speeds) + (0.15 if len(points) > 1 else 0.42) * room)
        name_points(axes, named, fontsize=8, color=INK)
    count = len(summary.prompts)
    settings = report.run["settings"]
    figure.text(
        0.015,
        0.018,
        f"{count} prompt{'s' * (count != 1)}, 95 % bootstrap intervals over prompts"
        + (f", {settings['steps']} steps" if settings["steps"] else "")
        + "; paired with the exact video of the same noise. Noise floor: a second exact run.",
        fontsize=8,
        color=SOFT,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def wrapped(text: str, width: int = 52) -> str:
    """A label in as many lines as it needs."""
    return "\n".join(textwrap.wrap(text, width))


def styled(axes, title: str):
    """Quiet axes."""
    axes.set_title(title, fontsize=9.5, color=SOFT, loc="left")
    axes.grid(True, color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    for label in axes.get_yticklabels():
        label.set_color(INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def frames_of(report: Report) -> tuple | None:
    """(prompt, [(run, middle frame)]) of the prompt of median quality, or None where its clips are gone."""
    rows = [row for row in report.summary.rows if row.run != FLOOR]
    candidate = next((row.run for row in rows if "psnr" in row.cells), None)
    keys = [key for key in report.videos if key[2] == candidate and key[0] in report.summary.prompts]
    keys = sorted(keys, key=lambda key: report.videos[key].get("figures", {}).get("psnr", 0.0))
    if not keys:
        return None
    prompt, seed, _ = keys[len(keys) // 2]
    shots = []
    for row in rows:
        line = report.videos.get((prompt, seed, row.run), {})
        try:
            clip = read_video(report.folder / line["clip"])
        except (BadVideoError, KeyError):
            continue
        shots.append((row.run, clip[len(clip) // 2]))
    return (prompt, shots) if shots else None
