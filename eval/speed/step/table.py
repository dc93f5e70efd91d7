"""What `bench step` measured, as Markdown and as a plot."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_video.files import write_whole
from lowbit_video.precision import names_recipe

from . import kernel_parts
from .names import EXACT, FRAMEWORKS, OURS, precision_of
from .part_table import kernels, profiles, share

PROLOGUE = ("Prologue: the share of kernels between projections and attention, norms, positions and quantisation; >=: compiled "
            "norms and positions come on top. ")
COLOURS = dict(zip(kernel_parts.PARTS, ("tab:red", "tab:green", "tab:purple", "tab:olive", "tab:brown", "lightgray")))
TWO_COLOURS = {"a step without attention": "tab:gray", "with exact or another library's": "tab:orange", "with ours": "tab:blue"}
MODE_TITLES: dict[str, str] = {"eager": "eager", "blocks": "blocks compiled", "model": "compiled whole"}


def markdown(about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """A table for each model: methods down, modes across."""
    told = any("parts_ms" in row for result in results for row in result["rows"])
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"# One denoising step on {about['gpu']}", "", f"{versions}; commit {about['commit']}.", "",
             "Random weights at published sizes. Medians in ms, all methods of a model in turns; in brackets the speed-up over "
             "the fastest exact attention of that column. Attention: its share of the step, quantisation counted, by a step "
             "without any attention, which has its norms and positions apart. " + PROLOGUE * told + "SQNR: of the eager step "
             "beside that by the first method of its table."]
    for result in results:
        modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
        parts = any("parts_ms" in row for row in result["rows"])
        last = modes[-1] if modes else ""
        made = f": {result['video_tokens']} tokens, batch {result['batch']}, {result['dtype']}" if "dtype" in result else ""
        head = ["attention", *(MODE_TITLES[mode] for mode in modes), "attention", *["prologue"] * parts, "peak GiB", "SQNR dB"]
        lines += ["", f"## {_heading(result)}{made}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for method in dict.fromkeys(row["method"] for row in result["rows"]):
            found = {row["mode"]: row for row in result["rows"] if row["method"] == method}
            lines.append(f"| {found[next(iter(found))]['title']} | "
                         + " | ".join([*(_time(found.get(mode)) for mode in modes), *_others(found, last, parts)]) + " |")
        untimed = result.get("not_timed", ())
        lines += [""] * bool(result["left_out"] or result["failed"] or untimed)
        lines += [f"Not timed: {row['title']}, {MODE_TITLES[row['mode']]}." for row in untimed]
        lines += [f"Left out: {method}, {reason}." for method, reason in result["left_out"].items()]
        lines += [f"Failed: {what}: {why}" for what, why in result["failed"].items()]
    lines += _beside(results)
    lines += kernels(results, _heading, MODE_TITLES)
    lines += profiles(results)
    lines += [f"\nThe process of {name} ended with status {status}: what is above of it is what it had measured by then."
              for name, status in about.get("ended", {}).items()]
    return "\n".join(lines) + "\n"


def _heading(result: Mapping[str, Any]) -> str:
    """The model, and whose: what was written before there were two frameworks is PyTorch's."""
    framework = result.get("framework", "torch")
    return result["model"] + ("" if framework == "torch" else f", {FRAMEWORKS[framework]}")


def _beside(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of Paddle's time over PyTorch's, of each model that both have: what one method took in one mode."""
    lines = []
    for result in results:
        other = next((one for one in results if one["model"] == result["model"] and one.get("framework") == "torch"), None)
        if result.get("framework") != "paddle" or other is None:
            continue
        took = {(row["method"], row["mode"]): row["median_ms"] for row in other["rows"]}
        shared = [row for row in result["rows"] if (row["method"], row["mode"]) in took]
        lines += ["", f"## {result['model']}: Paddle over PyTorch", "",
                  "One after the other on the same card, each in a process of its own.", "",
                  "| attention | mode | PyTorch ms | Paddle ms | Paddle / PyTorch |", "|" + " --- |" * 5]
        for row in shared:
            base, ours = took[row["method"], row["mode"]], row["median_ms"]
            lines.append(f"| {row['title']} | {MODE_TITLES[row['mode']]} | {base:.1f} | {ours:.1f} | {ours / base:.3f} |")
        if best := _best_exact(result, other):
            lines += ["", best]
    return lines


def _best_exact(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The fastest exact eager steps of both, in a line."""
    fastest = [min((row for row in result["rows"] if row["method"] in EXACT and row["mode"] == "eager"),
                   key=lambda row: row["median_ms"], default=None) for result in (other, ours)]
    if None in fastest:
        return ""
    said = [f"{FRAMEWORKS[name]}'s fastest exact eager step is by {row['title']}, {row['median_ms']:.1f} ms"
            for name, row in zip(FRAMEWORKS, fastest)]
    return f"{said[0]}; {said[1]}."


def _time(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    faster = f" ({row['speedup_over_exact']:.2f}x)" if row.get("speedup_over_exact") and row["method"] != "none" else ""
    return f"{row['median_ms']:.1f}{faster}"


def _others(found: Mapping[str, Mapping[str, Any]], last: str, parts: bool) -> list[str]:
    row, eager = found.get(last, {}), found.get("eager", {})
    attention, peak, sqnr = row.get("attention_share"), row.get("peak_gib"), eager.get("sqnr_db")
    shown = row.get("method") != "none"
    return ["" if attention is None or not shown else f"{attention:.0%}", *[share(row)] * parts,
            "" if peak is None else f"{peak:.1f}",
            "" if sqnr is None or not shown else "itself" if sqnr == float("inf") else f"{sqnr:.1f}"]


def plot(about: Mapping[str, Any], results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Bars of a step's time by method, a panel for each model, of its last mode: its parts by kernel where they were told, else
    a step without attention, then what the method adds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if len(results) == 4 else min(3, len(results))
    figure, axes = plt.subplots(-(-len(results) // columns), columns, squeeze=False, layout="constrained",
                                figsize=(4.6 * columns, 2.6 * -(-len(results) // columns) + 0.4))
    for axis in list(axes.flat)[len(results):]:
        axis.set_visible(False)
    stacked = 0
    for axis, result in zip(axes.flat, results):
        mode = result["rows"][-1]["mode"] if result["rows"] else ""
        rows = [row for row in result["rows"] if row["mode"] == mode]
        parts = any("parts_ms" in row for row in rows)
        stacked += parts
        rows = (_stacked if parts else _two_parts)(axis, rows)
        for place, row in enumerate(rows):
            axis.text(row["median_ms"], place, f" {row['median_ms']:.0f}", va="center", fontsize=7)
        axis.set_title(f"{_heading(result)}, {result['video_tokens']} tokens, {MODE_TITLES.get(mode, mode)}", fontsize=9)
        axis.set_xlim(0, 1.12 * max([row["median_ms"] for row in rows], default=1.0))
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms a step", fontsize=8)
    colours = {**(COLOURS if stacked else {}), **(TWO_COLOURS if stacked < len(results) else {})}
    figure.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()], list(colours), fontsize=7,
                  ncols=3, loc="outside lower center")
    figure.suptitle(f"One denoising step on {about['gpu']}, commit {about['commit']}", fontsize=9)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
    return path


def _two_parts(axis: Any, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Bars of a step without attention and of what each method adds; returns the rows that have one, as they stand."""
    without = next((row["median_ms"] for row in rows if row["method"] == "none"), 0.0)
    rows = [row for row in rows if row["method"] != "none"]
    names = [row["title"] for row in rows]
    low = ["+" in row["method"] or row["method"] == OURS or names_recipe(precision_of(row["method"])) for row in rows]
    if without:  # else the whole step has the colour of its attention
        axis.barh(names, [without] * len(rows), color="tab:gray")
    axis.barh(names, [row["median_ms"] - without for row in rows], left=without,
              color=["tab:blue" if ours else "tab:orange" for ours in low])
    return rows


def _stacked(axis: Any, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Bars of parts by kernel, of no attention too; a step whose parts were not told is white. Returns the rows."""
    names, ends = [row["title"] for row in rows], [0.0] * len(rows)
    for part, colour in COLOURS.items():
        widths = [row.get("parts_ms", {}).get(part, 0.0) for row in rows]
        axis.barh(names, widths, left=ends, color=colour)
        ends = [end + width for end, width in zip(ends, widths)]
    untold = [0.0 if "parts_ms" in row else row["median_ms"] for row in rows]
    if any(untold):
        axis.barh(names, untold, color="white", edgecolor="black", linewidth=0.5)
    return list(rows)
