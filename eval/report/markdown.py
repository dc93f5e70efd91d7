"""The report in short as Markdown, for a README."""
from __future__ import annotations

from ..compare.candidates import EXACT, FLOOR
from ..metrics import registry
from .data import PAGE, PICTURE, Report
from .text import NOTES, facts, interval_text, label_of, over_floor_text, plain, prompts_unfollowed, show_value


def markdown(report: Report) -> str:
    """The summary for a README: a table with intervals and the floor, and how it was made."""
    figures = [f for f in report.summary.figures if registry.metric(f).kind == "paired" or f.endswith(".all")]
    units = {f: registry.metric(f).unit for f in figures}
    head = [label_of(f) + (f" ({units[f]})" if units[f] else "") for f in figures]
    head = ["run", *head, "above the floor", report.speed_label]
    names = {EXACT: "exact", FLOOR: "noise floor (exact, once more)"}
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report.summary.rows:
        cells = [names.get(row.run, f"`{row.run}`")]
        for figure in figures:
            cell = row.cells.get(figure)
            cells.append(f"{show_value(figure, cell.value.value)} {interval_text(figure, cell.value)}" if cell else "")
        over = row.cells["psnr"].times_floor if "psnr" in row.cells else None
        cells.append(over_floor_text(over) if over else "failed" if row.failed else "")
        cells.append(plain(report.speed[row.run]) if row.run in report.speed else "")
        lines.append("| " + " | ".join(cells) + " |")
    notes = (f"{'; '.join(facts(report))}. Paired with the exact video of the same prompt and noise; brackets: 95 % bootstrap "
             f"intervals over prompts; above the floor: root mean square error in dB over that of the floor, {report.floor}. "
             f"The videos: [{PAGE}]({PAGE}).")
    notes += f"\n\n{NOTES['unfollowed']}" if prompts_unfollowed(report.summary) else ""
    notes += f"\n\n{NOTES['speed-up']}" if report.faster_is_higher else ""
    return f"<!-- made by `lowbit-video eval report` -->\n\n![Quality with intervals, and speed]({PICTURE})\n\n" \
        + "\n".join(lines) + f"\n\n{notes}\n"
