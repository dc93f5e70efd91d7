"""The report's page: one HTML file with style, script, films and figures inside, and a card for each section."""
from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..compare.candidates import EXACT, FLOOR
from ..metrics import registry
from .charts import alone_cell, colour_of, figure_cell, floor_chart, pareto, tag
from .data import Report
from .films import Reel
from .page_data import page_data
from .summary import ABOVE, CLEARLY_ABOVE, FAILED, WITHIN, Cell, Row
from .text import NOTES, facts, interval_text, label_of, over_floor, over_floor_text, plain, prompts_unfollowed, show_value

TITLE = "Does the video stay the same?"
BADGES = {WITHIN: "good", ABOVE: "warn", CLEARLY_ABOVE: "warn", FAILED: "bad"}
MODES = (("slider", "Slider"), ("beside", "Side by side"), ("difference", "Difference"))


def part(name: str) -> str:
    """A file of the page folder."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def page(report: Report, reels: Mapping[tuple, Reel]) -> str:
    """The HTML page, everything inside."""
    films = [tag("script", base64.b64encode(reels[pair].film).decode(), type="application/base64", id=f"reel-{i}")
             for i, pair in enumerate(report.pairs()) if pair in reels]
    data = json.dumps(page_data(report, reels), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    sections = [paired(report), viewer(reels), by_prompt(), groups(report), speed(report), layers(report), alone(report),
                reading(report)]
    source = f"{html.escape(report.folder.name)}/results.jsonl, begun {report.run['time']}"
    values = {"title": f"{TITLE} lowbit_video evaluation", "heading": TITLE, "css": part("page.css"), "js": part("page.js"),
              "lead": lead(report), "facts": "".join(tag("li", html.escape(fact)) for fact in facts(report)), "data": data,
              "reels": "\n".join(films), "sections": "\n".join(filter(None, sections)),
              "levels": f"{max((reel.levels for reel in reels.values()), default=0):.1f}",  # stands in a section
              "footer": f"Made by <code>lowbit-video eval report</code> from {source}."}
    text = part("page.html")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def lead(report: Report) -> str:
    """Two sentences that say what came out."""
    rows = [row for row in report.candidates() if "psnr" in row.cells]
    if not rows:
        return "No candidate has a PSNR yet."
    rows = sorted(rows, key=lambda row: -row.cells["psnr"].value.value)

    def say(row: Row) -> str:
        cell = row.cells["psnr"]
        text = f"{tag('b', html.escape(row.run))} at {show_value('psnr', cell.value.value)} dB PSNR"
        if not math.isnan(cell.value.low):
            text += f" {interval_text('psnr', cell.value)}"
        return text + (f", {over_floor(cell.times_floor.value)} against the noise floor" if cell.times_floor else "")

    text = f"Closest to the exact video is {say(rows[0])}."
    if len(rows) > 1:
        text += f" Furthest is {say(rows[-1])}."
    failed = [html.escape(row.run) for row in report.candidates() if row.failed]
    text += f" Failed on some prompts: {', '.join(failed)}." if failed else ""
    return text + (f" {NOTES['unfollowed']}" if prompts_unfollowed(report.summary) else "")


# ---- sections ----


def section(title: str, body: str, name: str, tools: str = "") -> str:
    """A titled card."""
    head = tag("div", tag("h2", title, id=f"{name}-title") + tools, kind="head")
    return tag("section", head + body, id=name, aria_labelledby=f"{name}-title")


def table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls inside its card when it is wider."""
    head = tag("thead", tag("tr", "".join(tag("th", text, scope="col") for text in heads)))
    return tag("div", tag("table", head + tag("tbody", "".join(tag("tr", row) for row in rows))), kind="scroll")


def figure_head(figure: str) -> str:
    """A column's head: name, unit, direction."""
    metric = registry.metric(figure)
    return f"{label_of(figure)} {tag('span', metric.unit, kind='unit')}{tag('div', metric.direction, kind='interval')}"


def run_head(row: Row, under: bool = True) -> str:
    """A row's head: colour, run, and under it what it is."""
    count = f"{row.videos} video{'s' * (row.videos != 1)}"
    count = f"{row.videos - row.failed} of {count}" if row.failed else count
    text = {EXACT: "the reference", FLOOR: "exact, once more"}.get(row.run, count)
    name = tag("span", tag("i", style=f"background:var({colour_of(row)})") + html.escape(row.run), kind="run")
    return tag("th", name + (tag("div", text, kind="interval") if under else ""), scope="row")


def paired(report: Report) -> str:
    """Against the exact video: value, interval, and times the floor."""
    figures = [f for f in report.summary.figures if registry.metric(f).kind in ("paired", "set")]
    rows = [row for row in report.summary.rows if row.run != EXACT]
    lines = []
    for row in rows:
        cell = row.cells.get("psnr")
        kind = "none" if row.run == FLOOR else BADGES.get(row.verdict, "none")
        text = tag("span", "the floor" if row.run == FLOOR else row.verdict, kind=f"badge {kind}")
        if cell and row.run != FLOOR:
            text += tag("div", over_floor_text(cell.times_floor), kind="interval")
        lines.append(run_head(row) + tag("td", text) + "".join(figure_cell(f, row, rows) for f in figures))
    against = "against the floor" + tag("div", "dB of PSNR's error", kind="interval")
    body = table(["run", against, *map(figure_head, figures)], lines)
    if strip := floor_chart([row for row in rows if row.run != FLOOR], "psnr"):
        body += tag("h3", "How far above the noise floor") + tag("div", tag("div", strip, kind="wide"), kind="scroll")
    text = tag("p", NOTES["paired"].format(floor=html.escape(report.floor)), kind="note")
    return section("Against the exact video", body + text, "paired")


def groups(report: Report) -> str:
    """Every figure that stands for a whole video, by group of prompts; "" without groups."""
    if not report.groups:
        return ""
    shown = [f for f in report.summary.figures if registry.metric(f).kind == "paired" or f.endswith(".all")]
    counts = {name: len(group.prompts) for name, group in report.groups.items()}
    heads = ["run", *(html.escape(name) + tag("div", f"{count} prompt{'s' * (count != 1)}", kind="interval")
                      for name, count in counts.items())]
    body = ""
    for figure in shown:
        lines = []
        for row in report.summary.rows:
            cells = [{own.run: own for own in group.rows}[row.run].cells.get(figure) for group in report.groups.values()]
            if any(cells):
                lines.append(run_head(row, under=False) + "".join(tag("td", group_cell(figure, cell)) for cell in cells))
        body += tag("h3", label_of(figure)) + table(heads, lines)
    return section("By kind of prompt", body + note("groups"), "groups")


def group_cell(figure: str, cell: Cell | None) -> str:
    """A value and its interval."""
    if cell is None:
        return "–"
    interval = tag("span", interval_text(figure, cell.value), kind="interval")
    return tag("span", show_value(figure, cell.value.value), kind="value") + " " + interval


def note(name: str) -> str:
    """A paragraph of NOTES."""
    return tag("p", NOTES[name], kind="note")


def viewer(reels: Mapping) -> str:
    """The videos; without films the script still finds its elements, hidden."""
    if not reels:
        hidden = f'<div hidden>{part("viewer.html")}<span id="modes"></span></div>'
        return section("Look for yourself", note("no films") + hidden, "viewer")
    buttons = "".join(tag("button", text, type="button", data_mode=mode, aria_pressed="false") for mode, text in MODES)
    modes = tag("span", buttons, kind="segment", id="modes", role="group", aria_label="How to compare")
    return section("Look for yourself", part("viewer.html"), "viewer", tag("div", modes, kind="tools"))


def by_prompt() -> str:
    """Per-prompt rows; the script fills and sorts them, worst first."""
    tools = tag("div", tag("label", "figure " + tag("select", id="figure")), kind="tools")
    body = tag("div", tag("table", "<thead><tr></tr></thead><tbody></tbody>", id="prompts"), kind="scroll")
    return section("Prompt by prompt", body + note("prompts"), "by-prompt", tools)


def speed(report: Report) -> str:
    """Speed beside quality."""
    chart = pareto(report.summary, report.speed, report.speed_label, report.faster_is_higher, compares=not report.on_reference)
    unit = "×" if report.faster_is_higher else " s"
    rows = []
    for row in report.summary.rows:
        if row.run in report.speed:
            cells = tag("td", plain(report.speed[row.run]) + unit, kind="value")
            rows.append(run_head(row, under=False) + cells + tag("td", html.escape(attention_text(row)), kind="interval"))
    columns = table(["run", html.escape(report.speed_label), "attention that ran (calls)"], rows)
    body = tag("div", tag("div", tag("div", chart, kind="chart"), kind="scroll") + columns, kind="two")
    body += note("speed-up" if report.faster_is_higher else "reference" if report.on_reference else "seconds")
    return section("Time of this run beside quality" if report.on_reference else "Speed beside quality", body, "speed")


def attention_text(row: Row) -> str:
    """ "int4+fp16: 4800", and a warning where some module fell back."""
    known = ", ".join(f"{variant}: {calls}" for variant, calls in row.attention.items())
    text = known or ("the pipeline's own" if row.run == EXACT else "not counted")
    return text + (f"; {row.fallbacks} modules fell back" if row.fallbacks else "")


def layers(report: Report) -> str:
    """The heat map; the script draws it."""
    if not report.layers:
        return ""
    about = report.layers.about
    across = tag("select", tag("option", "steps", value="steps") + tag("option", "heads", value="heads"), id="heat-across")
    choices = ["candidate " + tag("select", id="heat-run"), "figure " + tag("select", id="heat-figure"), "across " + across]
    tools = tag("div", "".join(tag("label", choice) for choice in choices), kind="tools")
    heat = tag("svg", id="heat", kind="heat", role="group", aria_label="Error by layer")
    heat = tag("div", heat + tag("p", "", id="heat-say", aria_live="polite"), kind="scroll")
    side = tag("h3", "Largest shares") + tag("ol", kind="worst", id="worst") + tag("p", kind="note", id="heat-total")
    text = (f"One run, “{html.escape(about['prompt'])}”, seed {about['seed']}: at every attention call each candidate ran "
            f"beside exact attention on the same q, k, v. {NOTES[about['shares']]}")
    body = tag("div", heat + tag("div", side), kind="two") + tag("p", text, kind="note")
    return section("Where the error comes from", body, "layers", tools)


def alone(report: Report) -> str:
    """Figures of one video: value, and the change from the exact run."""
    figures = [f for f in report.summary.figures if registry.metric(f).kind == "alone"]
    if not figures:
        return ""
    rows = [run_head(row) + "".join(alone_cell(f, row) for f in figures) for row in report.summary.rows]
    body = table(["run", *map(figure_head, figures)], rows) + note("alone")
    body += note("unfollowed") if prompts_unfollowed(report.summary) else ""
    return section("Each video on its own", body, "alone")


def reading(report: Report) -> str:
    """How to read it, what did not run, and what the run asked for."""
    body = part("reading.html")
    reasons = [tag("li", f"{tag('b', html.escape(k))}: {html.escape(v)}") for k, v in report.run.get("missing", {}).items()]
    if reasons:
        body += tag("details", "<summary>Metrics that did not run</summary>" + tag("ul", "".join(reasons), kind="note"))
    record = html.escape(json.dumps(report.run, indent=1, ensure_ascii=False))
    body += tag("details", f"<summary>The run as recorded</summary><pre>{record}</pre>")
    return section("How to read this", body, "reading")
