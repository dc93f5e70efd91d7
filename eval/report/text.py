"""What the page and the Markdown say in the same words: numbers, names of figures, notes, and the facts of a run."""
from __future__ import annotations

import math
from pathlib import Path

from ..compare.candidates import EXACT
from ..metrics import registry
from .bootstrap import Interval
from .data import Report
from .summary import Summary

FOLLOWED = 0.25  # share of prompts that the exact run must show in all parts for adherence to mean something
NOTES = {
    "paired": "Each video is compared, frame by frame, with the exact video of the same prompt and noise. Brackets are 95 % "
              "bootstrap intervals over prompts. The floor ({floor}) is what two correct "
              "implementations differ by. +20 dB are ten times its root mean square "
              "error. In float32 the floor lies so deep that every low-bit run is far above it: far above is not the same "
              "as visible. Look at the videos.",
    "no films": "No films are in this page; make it again where the clips are.",
    "prompts": "Worst first. A column head sorts by it; a prompt opens its videos.",
    "seconds": "Seconds are of this evaluation on this machine, the median over prompts.",
    "reference": "These times are not a speed. Low-bit attention ran through the NumPy reference on a CPU, which exists to be "
                 "right: it says nothing about a GPU. Name a benchmark's JSON with --speed to see that here.",
    "unfollowed": "This model does not follow these prompts: adherence is near zero at full precision already, all parts of a "
                  "prompt taken together, so it cannot show what low bit costs. Read the paired figures instead.",
    "speed-up": "Speed-ups are of the attention operator alone, at the benchmark's own shape, with quantisation; “exact” is "
                "the toolkit's own full-precision kernel there. Quality is of this evaluation's model. A video gains less.",
    "local": "Shares are of local squared errors; their way to the final latent was not measured.",
    "measured": "Shares are local squared errors, scaled to what runs with one layer, or one group of steps, at low bit left "
                "in the final latent.",
    "groups": "The same figures on the prompts of each kind alone; brackets are 95 % bootstrap intervals over these.",
    "alone": "The mean over prompts, and under it the mean change from the exact video of the same prompt with its 95 % "
             "interval. An interval that holds 0 shows no change; with few prompts it is wide.",
}


def digits(figure: str) -> int:
    """Decimals a figure is shown with."""
    return registry.metric(figure).digits


def show_value(figure: str, value: float) -> str:
    """A figure's value with its decimals."""
    return f"{value:.{digits(figure)}f}"


def plain(value: float) -> str:
    """A number with three significant digits and no exponent: 0.123, 4.56, 78.9, 1234."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    """ "x times the floor" for people: 1.4x, 320x, 12 000x, 3.4 million x."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞×"
    if value >= 1e6:
        return f"{value / 1e6:.3g} million ×"
    if value >= 1e3:
        return f"{round(value, -2 if value >= 1e4 else -1):,.0f}×".replace(",", "\u202f")
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×"


def over_floor(value: float) -> str:
    """ "x times the floor" as dB above it, 20 log10 x: "+78 dB"; in float32 the floor is so low that factors read oddly."""
    if math.isnan(value):
        return "–"
    if value <= 0 or math.isinf(value):
        return "∞ dB" if value > 0 else "−∞ dB"
    return f"{20 * math.log10(value):+.0f} dB".replace("-", "−")


def interval_text(figure: str, value: Interval) -> str:
    """[low, high], or why there is none."""
    if math.isnan(value.low):
        return "no interval"
    return f"[{show_value(figure, value.low)}, {show_value(figure, value.high)}]"


def over_floor_text(over: Interval | None) -> str:
    """dB above the floor with the interval."""
    if over is None:
        return "no floor"
    ends = [over_floor(end).removesuffix(" dB") for end in (over.low, over.high)]
    return over_floor(over.value) + ("" if math.isnan(over.low) else f" [{', '.join(ends)}]")


def label_of(figure: str) -> str:
    """A figure's name for people: "adherence.colour" is "adherence: colour"."""
    part = figure.partition(".")[2]
    return registry.metric(figure).label + (f": {part}" if part else "")


def prompts_unfollowed(summary: Summary) -> bool:
    """Whether the exact run so rarely shows its prompt that adherence cannot tell candidates apart."""
    exact = summary.row(EXACT).cells.get("adherence.all")
    return exact is not None and exact.value.value < FOLLOWED


def facts(report: Report) -> list[str]:
    """What ran, in a few words each."""
    settings, machine = report.run["settings"], report.run["environment"]
    prompts, seeds = len(report.summary.prompts), len(report.summary.seeds)
    items = [f"{prompts} prompt{'s' * (prompts != 1)}, {seeds} seed{'s' * (seeds != 1)} each"]
    if settings["model"]:
        items.append(f"model {model_name(settings['model'])}")
    for name, form in (("steps", "{:g} steps"), ("guidance", "guidance {:g}"), ("frames", "{:g} frames")):
        if settings[name]:
            items.append(form.format(settings[name]))
    items.append(f"{machine['machine']}, {machine['device']}")
    versions = machine["versions"]
    items += [f"{name} {versions[name]}" for name in ("lowbit-video", "paddlepaddle", "paddlepaddle-gpu") if name in versions]
    return items + ([f"commit {machine['commit']}"] if machine.get("commit") else [])


def model_name(folder: str) -> str:
    """A model folder's name, with its parent's where it is only called "model"."""
    path = Path(folder)
    return f"{path.parent.name}/{path.name}" if path.name == "model" and path.parent.name else path.name
