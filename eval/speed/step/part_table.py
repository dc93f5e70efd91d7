"""Where steps' time goes, as Markdown: by kernel, a table for each model; by part of the model, one for each attention."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import kernel_parts
from .names import FRAMEWORKS
from .parts import PARTS


def kernels(results: Sequence[Mapping[str, Any]], heading: Callable[[Mapping[str, Any]], str], modes: Mapping[str, str]
            ) -> list[str]:
    """The lines of parts by kernel; none where none were told. heading: of a model. modes: their titles."""
    lines: list[str] = []
    for result in results:
        if rows := [row for row in result["rows"] if "parts_ms" in row]:
            lines += ["", f"## {heading(result)}", "", f"| attention | mode | {' | '.join(kernel_parts.PARTS)} | step |",
                      "|" + " --- |" * (len(kernel_parts.PARTS) + 3)]
            lines += [f"| {row['title']} | {modes[row['mode']]} | "
                      + " | ".join(f"{row['parts_ms'][part]:.1f}" for part in kernel_parts.PARTS)
                      + f" | {row['median_ms']:.1f} |" for row in rows]
    if lines:
        said = "; ".join(f"{part}: {words}" for part, words in kernel_parts.PARTS.items())
        lines = ["", "# Where the device's time goes", "", f"ms of kernels of one profiled step. {said}. Where blocks are "
                 "compiled, norms and positions of Q and K that are not fused with quantisation cannot be told from others and "
                 "are with these.", *lines]
    return lines


def share(row: Mapping[str, Any]) -> str:
    """The prologue's, as a table has it: "" where it is not known, ">=" where a part of it is counted elsewhere."""
    if "prologue_share" not in row or not (row["prologue_whole"] or row["prologue_share"]):
        return ""
    return ">= " * (not row["prologue_whole"]) + f"{row['prologue_share']:.0%}"


def profiles(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines; none where nothing was profiled."""
    lines: list[str] = []
    for model in dict.fromkeys(result["model"] for result in results):
        found = {(result.get("framework", "torch"), one["method"]): one for result in results if result["model"] == model
                 for one in result.get("profiles", ())}
        for method in dict.fromkeys(method for _, method in found):
            lines += _table(model, {name: found[name, method] for name in FRAMEWORKS if (name, method) in found})
    if lines:
        said = "; ".join(f"{part}: {words}" for part, words in PARTS.items())
        lines = ["", "# Where an eager step's time goes", "",
                 f"ms between marks on the stream. {said}. Host: its own time in a part. Until a step returns: the device idle "
                 "at its beginning; more than the blocks' own time means that the device's queue was full.", *lines]
    return lines


def _table(model: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One attention's, by framework."""
    both = len(found) == len(FRAMEWORKS)
    named = [FRAMEWORKS[name] for name in found]
    head = ["part", *(f"{name} ms" for name in named), *(["Paddle / PyTorch"] if both else []),
            *(f"{name} host" for name in named)]
    title = next(iter(found.values()))["title"]
    lines = ["", f"## {model}: {title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]

    def row(name: str, ms: Sequence[float | None], host: Sequence[float | None]) -> str:
        ratio = [f"{ms[1] / ms[0]:.2f}" if all(ms) else ""] if both else []
        return f"| {' | '.join([name, *map(_number, ms), *ratio, *map(_number, host)])} |"

    for part in PARTS:
        own = [one["parts"].get(part, {}) for one in found.values()]
        if any(own):
            lines.append(row(part, [x.get("ms") for x in own], [x.get("host_ms") for x in own]))
    lines.append(row("together", [one["marked_ms"] for one in found.values()],
                     [sum(part["host_ms"] for part in one["parts"].values()) for one in found.values()]))
    lines.append("")
    for name, one in zip(named, found.values()):
        lines += [f"{name}: {one['host_ms']:.1f} ms until a step returns, the blocks' own {one['host_blocks_ms']:.1f}; "
                  f"between host and device: {_counts(one['waits']['reads'])}; run on the CPU for the lack of a kernel: "
                  f"{_counts(one['waits']['on the CPU'])}.", ""]
    return lines[:-1]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _counts(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return "not told here"
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
