"""The report's page: sections as HTML, and the data that the page's script draws from."""
from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..compare.candidates import EXACT, FLOOR
from ..compare.layers import LayerTable
from ..metrics import registry
from .charts import (
    alone_cell,
    colour_of,
    digits,
    figure_cell,
    floor_chart,
    interval_text,
    over_floor,
    over_floor_text,
    pareto,
    plain,
    show_value,
    tag,
)
from .summary import ABOVE, CLEARLY_ABOVE, FAILED, WITHIN, Row, Summary

if TYPE_CHECKING:
    from .write import Reel, Report

TITLE = "Does the video stay the same?"
BADGES = {WITHIN: "good", ABOVE: "warn", CLEARLY_ABOVE: "warn", FAILED: "bad"}
LABELS = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "clipsim": "CLIPSIM", "vqa": "VQAScore",
          "clip_temporal": "CLIP-temporal", "fvd": "FVD-style", "warping_error": "warping error", "sqnr": "SQNR",
          "motion_smoothness": "motion smoothness", "dynamic_degree": "dynamic degree", "relative_l1": "relative L1",
          "rmse": "RMSE", "max_error": "max error"}
WORST_SHARES = 6
FOLLOWED = 0.25  # share of prompts that the exact run must show in all parts for adherence to mean something
NOTES = {
    "paired": "Each video is compared, frame by frame, with the exact video of the same prompt and noise. Brackets are 95 % "
              "bootstrap intervals over prompts. The floor is a second exact run that reads the keys in another order and "
              "splits the batch: what any two correct implementations differ by. +20 dB are ten times its root mean square "
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
    "alone": "The mean over prompts, and under it the mean change from the exact video of the same prompt with its 95 % "
             "interval. An interval that holds 0 shows no change; with few prompts it is wide.",
}
MODES = (("slider", "Slider"), ("beside", "Side by side"), ("difference", "Difference"))


def part(name: str) -> str:
    """A file of the page folder."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def label_of(figure: str) -> str:
    """A figure's name for people: "adherence.colour" is "adherence: colour"."""
    base, _, rest = figure.partition(".")
    return LABELS.get(base, base) + (f": {rest}" if rest else "")


def page(report: Report, reels: Mapping[tuple, Reel]) -> str:
    """The HTML page, everything inside."""
    films = [tag("script", base64.b64encode(reels[pair].film).decode(), type="application/base64", id=f"reel-{i}")
             for i, pair in enumerate(report.pairs()) if pair in reels]
    data = json.dumps(page_data(report, reels), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    sections = [paired(report), viewer(reels), by_prompt(), speed(report), layers(report), alone(report), reading(report)]
    source = f"{html.escape(report.folder.name)}/results.jsonl, begun {report.run['time']}"
    values = {"title": f"{TITLE} lowbit_video evaluation", "heading": TITLE, "css": part("page.css"), "js": part("page.js"),
              "lead": lead(report), "facts": "".join(tag("li", html.escape(fact)) for fact in facts(report)), "data": data,
              "reels": "\n".join(films), "sections": "\n".join(filter(None, sections)),
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
    way = {None: "compare only", True: "higher is better", False: "lower is better"}[metric.higher_is_better]
    return f"{label_of(figure)} {tag('span', metric.unit, kind='unit')}{tag('div', way, kind='interval')}"


def run_head(row: Row, under: bool = True) -> str:
    """A row's head: colour, run, and under it what it is."""
    count = f"{row.videos} video{'s' * (row.videos != 1)}"
    count = f"{row.videos - row.failed} of {count}" if row.failed else count
    text = {EXACT: "the reference", FLOOR: "exact, reordered"}.get(row.run, count)
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
    return section("Against the exact video", body + note("paired"), "paired")


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


# ---- data for the script ----


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
            reduce = {"share": np.sum, "max_error": np.max}.get(name, np.mean)
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


def candidates_of(summary: Summary) -> list[Row]:
    """The rows that are neither exact nor the floor."""
    return [row for row in summary.rows if row.run not in (EXACT, FLOOR)]
