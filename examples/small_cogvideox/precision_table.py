"""The table of `evaluate_precisions.py`: quality, adherence and time of runs, with intervals, also by kind of background."""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from parts import ABOUT

from lowbit_video.eval.compare.candidates import EXACT, FLOOR
from lowbit_video.eval.compare.store import Store
from lowbit_video.eval.metrics import registry
from lowbit_video.eval.report.bootstrap import Interval, bootstrap, mean
from lowbit_video.eval.report.groups import by_group
from lowbit_video.eval.report.summary import Row, Summary, summarise
from lowbit_video.eval.report.text import label_of

KEPT = "kept"  # share of all pairs of a query tile and a key tile
ADHERENCE = "adherence."
OVER_FLOOR = "psnr_over_floor_db"  # root mean square error over that of the floor, in dB


def is_exact(run: str) -> bool:
    """Whether a run is exact attention, by whatever kernel."""
    return run in (EXACT, FLOOR) or run.startswith("exact (")


def as_dict(value: Interval, change: Callable[[float], float] = float) -> dict:
    """Plain numbers, None where there is no interval."""
    low, high = (None if math.isnan(x) else change(x) for x in (value.low, value.high))
    return {"value": change(value.value), "low": low, "high": high}


def decibels(times: float) -> float:
    return 20 * math.log10(times) if times > 0 else -math.inf


def quality_of(row: Row) -> dict:
    """Every figure of a run, and how far its error is above the floor's."""
    found = {name: as_dict(cell.value) for name, cell in row.cells.items()}
    over = row.cells["psnr"].times_floor if "psnr" in row.cells else None
    if over and over.low > 0 and math.isfinite(over.high):  # a floor of no error at all has no decibels above it
        found[OVER_FLOOR] = as_dict(over, decibels)
    return found


def times_of(summary: Summary, videos: list[dict]) -> tuple[dict[str, dict], str]:
    """Each run's seconds of denoising (median over captions) and speed-up over the fastest exact attention; which that is."""
    seconds = {}
    for row in summary.rows:
        own = {v["prompt"]: v["timings"]["denoise"] for v in videos if v["run"] == row.run and "timings" in v}
        if all(prompt in own for prompt in summary.prompts):
            seconds[row.run] = np.array([own[prompt] for prompt in summary.prompts])
    median = lambda values: np.median(values, -1)
    best = min((run for run in seconds if is_exact(run)), key=lambda run: median(seconds[run]))
    return {run: {"seconds": as_dict(bootstrap(median, own)),
                  "speed_up": as_dict(bootstrap(lambda a, b: median(a) / median(b), seconds[best], own))}
            for run, own in seconds.items()}, best


def below_of(videos: list[dict], prompts: list[str], kept: dict[str, float]) -> dict[str, dict[str, dict]]:
    """By how much each run's PSNR and adherence are below those of the first precision that pools nothing, caption by caption:
    means with intervals, by figure; a run above it is below by less than nothing. {} where every precision pools."""
    by_run = {}
    for video in videos:
        by_run.setdefault(video["run"], {})[video["prompt"]] = video.get("figures", {})
    dense = next((run for run, share in kept.items() if share == 1 and not is_exact(run)), None)
    found = {}
    for run, own in by_run.items() if dense else ():
        for name in by_run[dense][prompts[0]] if run != dense else ():
            if name == "psnr" or name.startswith(ADHERENCE):
                pairs = [(by_run[dense][prompt].get(name), own.get(prompt, {}).get(name)) for prompt in prompts]
                if all(value is not None for pair in pairs for value in pair):
                    less = as_dict(bootstrap(mean, [full - value for full, value in pairs]))
                    found.setdefault(run, {})[name] = less
    return found


def record_of(store: Store) -> dict:
    """The whole table as plain values.

    Raises:
        ValueError: no caption has all its videos yet."""
    runs, videos = store.runs(), store.videos()
    order = list(dict.fromkeys(name for run in runs for name in run["runs"]))
    summary = summarise(videos, order)
    times, best = times_of(summary, videos)
    last = runs[-1]
    record = {name: last[name] for name in ("framework", "dtype", "backend", "reference", "floor", "missing", "environment")}
    record |= {name: last.get(name, ABOUT[name]) for name in ("compiled", "order", "cuda_graph")}
    record["kept"] = {run: share for known in runs for run, share in known.get("kept", {}).items()}
    record |= {"model": last["settings"]["model"], "generation": last["generation"], "captions": len(summary.prompts),
               "captions_wanted": len(last["prompts"]), "best_exact": best, "by_the_reference": any(
                   "(reference" in variant for row in summary.rows for variant in row.attention)}
    made = {row.run for row in summary.rows}
    record["not_made"] = [name for name in last["runs"] if name not in made]
    record["rows"] = {row.run: {**quality_of(row), **times.get(row.run, {}), "failed": row.failed, "attention": row.attention,
                                "fallbacks": row.fallbacks} for row in summary.rows}
    for run, share in record["kept"].items():
        if share < 1 and run in record["rows"]:
            record["rows"][run][KEPT] = {"value": share, "low": None, "high": None}
    record["groups"] = {name: {"captions": len(group.prompts), "rows": {row.run: quality_of(row) for row in group.rows}}
                        for name, group in by_group(videos, order).items()}
    if any(share < 1 for share in record["kept"].values()):
        record["below"] = below_of(videos, summary.prompts, record["kept"])
    return record


def cell(figures: dict, name: str, form: Callable[[float], str]) -> str:
    """A value with its interval, "-" where there is none."""
    if name not in figures:
        return "-"
    value, low, high = (figures[name][key] for key in ("value", "low", "high"))
    return form(value) + ("" if low is None else f" ({form(low)}..{form(high)})")


def columns_of(rows: dict) -> list[tuple[str, str, Callable[[float], str]]]:
    """(figure, its head, how it is written) of every figure that a row has, paired ones first."""
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    found = []
    for name in sorted((n for n in names if n.partition(".")[0] in registry.metrics() and not n.endswith(".all")),
                       key=lambda n: registry.metric(n).place):
        metric = registry.metric(name)
        if name.startswith("adherence."):
            found.append((name, name.partition(".")[2] + ", %", lambda x: f"{100 * x:.0f}"))
        else:
            head = label_of(name) + (f", {metric.unit}" if metric.unit else "")
            found.append((name, head, lambda x, digits=metric.digits: f"{x:.{digits}f}"))
    extra = ((KEPT, "tiles kept, %", lambda x: f"{100 * x:.0f}"), (OVER_FLOOR, "above the floor, dB", lambda x: f"{x:+.0f}"),
             ("seconds", "denoising, s", lambda x: f"{x:.3g}"),
             ("speed_up", "speed-up", lambda x: f"{x:.2f}x"))
    return found + [column for column in extra if column[0] in names]


def lines_of(rows: dict) -> list[str]:
    """The rows of one table in Markdown."""
    columns = columns_of(rows)
    lines = ["| attention | " + " | ".join(head for _, head, _ in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for run, figures in rows.items():
        name = {EXACT: "exact, the reference", FLOOR: "exact, this project's (noise floor)"}.get(run, run)
        name += f" (failed on {figures['failed']})" if figures.get("failed") else ""
        lines.append(f"| {name} | " + " | ".join(cell(figures, column, form) for column, _, form in columns) + " |")
    return lines


def markdown(record: dict) -> str:
    """The card's table, what it means, and the same figures by kind of background."""
    asked, rows = record["generation"], record["rows"]
    lines = lines_of(rows) + ["", (
        f"{record['captions']} held-out captions, {asked['num_inference_steps']} steps, guidance {asked['guidance_scale']:g}, "
        f"{record['dtype']}, {record['framework']}{', blocks compiled' * record['compiled']}"
        f"{', the transformer as one CUDA graph' * record['cuda_graph']}"
        f"{', tokens in the order ' + record['order'] if record['order'] != 'raster' else ''}, "
        f"{record['environment']['device']}, commit "
        f"{record['environment']['commit']}; the same noise for every run; mean (95 % interval by bootstrap over captions), "
        f"seconds: median. The reference is "
        f"{record['reference']}; the noise floor {record['floor']}. Speed-ups are of denoising as a whole, over the fastest "
        f"exact attention here ({record['best_exact']}).")]
    if record["captions"] < record["captions_wanted"]:
        lines.append(f"\nNot finished: {record['captions_wanted']} captions were asked for.")
    if record["not_made"]:
        lines.append(f"\nNot made before the time was over: {', '.join(record['not_made'])}.")
    if record["by_the_reference"]:
        lines.append("\nLow-bit attention ran by the NumPy reference on a CPU: its seconds are not a speed.")
    if record["missing"]:
        lines.append("\nNot here: " + "; ".join(f"{name} ({reason})" for name, reason in record["missing"].items()) + ".")
    if other := record.get("beside"):
        values = list(other["psnr_db"].values())
        lines.append(f"\nThe exact videos of {len(values)} captions are {np.mean(values):.1f} dB from those in "
                     f"{other['folder']} (worst {min(values):.1f}).")
        if other["floor_db"]:
            here, there = (np.mean(list(other[name].values())) for name in ("floor_db", "floor_there_db"))
            lines[-1] += (f" Of the same {len(other['floor_db'])} the noise floor is at {here:.1f} dB here and {there:.1f} "
                          "there.")
    for name, group in record["groups"].items():
        lines += ["", f"{name} background, {group['captions']} captions:", "", *lines_of(group["rows"])]
    return "\n".join(lines) + "\n"
