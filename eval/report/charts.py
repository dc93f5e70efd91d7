"""The page's charts as inline SVG, coloured by the page's own variables so that light and dark both work."""
from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ..compare.candidates import EXACT, FLOOR
from ..metrics import registry
from .bootstrap import Interval
from .summary import Cell, Row, Summary
from .text import interval_text, label_of, over_floor, plain, show_value, times

LETTER = 7.5  # at most so many units of an SVG is a letter of a strong label wide
COLOURS = 8  # as many --c variables has the page


def colour_of(row: Row) -> str:
    """The page variable that colours a run: candidates by their place, so that one keeps its colour through the page."""
    if row.run in (EXACT, FLOOR):
        return "--faint" if row.run == FLOOR else "--ink"
    return f"--c{row.place % COLOURS}"


def tag(name: str, content: str = "", **attributes) -> str:
    """An element; `kind` is its class, underscores in names become hyphens, floats get one decimal."""
    text = ""
    for key, value in attributes.items():
        value = f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))
        text += f' {"class" if key == "kind" else key.replace("_", "-")}="{value}"'
    return f"<{name}{text}>{content}</{name}>"


def label(content: str, x: float, y: float, anchor: str = "start", strong: bool = False) -> str:
    """A text, escaped."""
    return tag("text", html.escape(content), x=float(x), y=float(y), text_anchor=anchor, kind="strong" if strong else "plain")


def line(x1: float, y1: float, x2: float, y2: float, **more) -> str:
    """A line; an axis unless it is told otherwise."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **({"kind": "axis"} | more))


def dot(x: float, y: float, radius: float, colour: str) -> str:
    """A filled circle in a page colour."""
    return tag("circle", cx=float(x), cy=float(y), r=radius, fill=f"var({colour})")


def bar(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """The stroke of an interval in a page colour."""
    return line(x1, y1, x2, y2, kind="whisker", stroke=f"var({colour})")


def picture(width: float, height: float, content: Sequence[str], name: str) -> str:
    """An SVG as wide as its place, with a name for screen readers."""
    return tag("svg", "".join(content), viewBox=f"0 0 {width} {height}", style=f"width:100%;max-width:{width}px", role="img",
               aria_label=name)


def bounds(cells: Sequence[Cell]) -> tuple[float, float]:
    """The span of values and intervals, a little widened."""
    ends = [x for c in cells for x in (c.value.value, c.value.low, c.value.high) if not math.isnan(x)]
    low, high = min(ends), max(ends)
    room = (high - low) * 0.04 or 1e-6
    return low - room, high + room


def whisker(value: Interval, low: float, high: float, colour: str, width: int = 118, height: int = 14) -> str:
    """A dot with its interval on a common axis."""
    x = lambda v: 4 + (width - 8) * (v - low) / (high - low)
    middle = height / 2
    parts = [line(0, middle, width, middle)]
    if not math.isnan(value.low):
        parts.append(bar(x(value.low), middle, x(value.high), middle, colour))
    parts.append(dot(x(value.value), middle, 4, colour))
    return tag("svg", "".join(parts), width=width, height=height, viewBox=f"0 0 {width} {height}", aria_hidden="true")


def figure_cell(figure: str, row: Row, rows: Sequence[Row]) -> str:
    """A table cell: value, interval, and both drawn on the column's axis."""
    cell = row.cells.get(figure)
    if cell is None:
        return tag("td", "failed" if row.failed else "–", kind="interval")
    low, high = bounds([r.cells[figure] for r in rows if figure in r.cells])
    value = tag("span", show_value(figure, cell.value.value), kind="value")
    interval = tag("span", interval_text(figure, cell.value), kind="interval")
    return tag("td", f"{value} {interval}{whisker(cell.value, low, high, colour_of(row))}")


def alone_cell(figure: str, row: Row) -> str:
    """A table cell: value, and the change from exact with its interval."""
    cell = row.cells.get(figure)
    if cell is None:
        return tag("td", "–", kind="interval")
    text = tag("span", show_value(figure, cell.value.value), kind="value")
    if cell.change is not None:
        show = lambda v: f"{v:+.2g}".replace("-", "−") if v else "0"  # a line may end after a hyphen, not after a minus
        low, high = cell.change.low, cell.change.high
        interval = "" if math.isnan(low) else f" [{show(low)}, {show(high)}]"
        text += tag("div", show(cell.change.value) + interval, kind="interval")
    return tag("td", text)


def floor_chart(rows: Sequence[Row], figure: str) -> str:
    """dB above the floor: a row a candidate, the band up to 0 dB is the floor; "" where there is none."""
    cells = [(row, row.cells[figure].times_floor) for row in rows if figure in row.cells and row.cells[figure].times_floor]
    cells = [(row, over) for row, over in cells if math.isfinite(over.value) and over.value > 0]
    if not cells:
        return ""
    ends = [x for _, over in cells for x in (over.value, over.low, over.high) if math.isfinite(x) and x > 0]
    left, width, row_height, foot, right = 150, 1080, 28, 28, 170
    low, high = min(0.5, min(ends) * 0.8), max(10.0, max(ends) * 1.6)
    x = lambda v: left + (width - left - right) * (math.log(v) - math.log(low)) / (math.log(high) - math.log(low))
    bottom = row_height * len(cells)
    out = [tag("rect", kind="band", x=left, y=0, width=x(1.0) - left, height=bottom)]
    for decade in range(int(math.log10(high)) + 1):
        at = x(10.0**decade)
        out += [line(at, 0, at, bottom), label(over_floor(10.0**decade) if decade else "the floor", at, bottom + 18, "middle")]
    for i, (row, over) in enumerate(cells):
        y, colour = row_height * (i + 0.5), colour_of(row)
        out.append(label(row.run, left - 14, y + 4, "end", strong=True))
        whole = math.isfinite(over.low) and over.low > 0 and math.isfinite(over.high)
        if whole:
            out.append(bar(x(over.low), y, x(over.high), y, colour))
        text = f"{over_floor(over.value)} ({times(over.value)})"
        out += [dot(x(over.value), y, 5.5, colour), label(text, x(over.high if whole else over.value) + 12, y + 4)]
    return picture(width, bottom + foot, out, "Error of each candidate in dB above the noise floor")


def frontier(points: Sequence[tuple[float, float]], faster_is_higher: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both speed and quality (y, higher is better), from slow to fast."""
    better = (lambda a, b: a >= b) if faster_is_higher else (lambda a, b: a <= b)
    kept = [p for p in points if not any(q != p and better(q[0], p[0]) and q[1] >= p[1] for q in points)]
    return sorted(set(kept), reverse=not faster_is_higher)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values between two ends."""
    raw = (high - low) / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw * 0.999)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def pareto(summary: Summary, speed: Mapping[str, float], name: str, faster_is_higher: bool, figure: str = "psnr",
           compares: bool = True) -> str:
    """Speed across, quality up with its interval, and the line of those that nothing beats in both.

    compares: whether the times say anything about speed; otherwise no way is called faster and no frontier is drawn.
    """
    points = [(row, speed[row.run], row.cells[figure].value) for row in summary.rows
              if row.run in speed and row.run not in (EXACT, FLOOR) and figure in row.cells]
    if not points:
        return tag("p", "No candidate has both a speed and a quality.", kind="note")
    width, height, left, foot, top, right = 600, 360, 48, 46, 24, 16
    speeds = [s for _, s, _ in points] + ([speed[EXACT]] if EXACT in speed else [])
    x_low, x_high = min(speeds), max(speeds)
    room = (x_high - x_low) * 0.22 or x_high * 0.2
    x_low, x_high = max(0.0, x_low - room), x_high + room
    y_low, y_high = bounds([row.cells[figure] for row, _, _ in points])
    y_low, y_high = y_low - (y_high - y_low) * 0.06, y_high + (y_high - y_low) * 0.12
    bottom = height - foot
    x = lambda v: left + (width - left - right) * (v - x_low) / (x_high - x_low)
    y = lambda v: top + (bottom - top) * (y_high - v) / (y_high - y_low)
    out = []
    for tick in ticks(y_low, y_high):
        out += [line(left, y(tick), width - right, y(tick)), label(plain(tick), left - 10, y(tick) + 4, "end")]
    out += [label(plain(tick), x(tick), bottom + 18, "middle") for tick in ticks(x_low, x_high)]
    arrow = " (faster →)" if faster_is_higher else " (← faster)"
    out.append(label(name + (arrow if compares else ""), (left + width - right) / 2, height - 6, "middle"))
    out.append(label(f"{label_of(figure)} {registry.metric(figure).unit}".strip(), 0, 10, strong=True))
    if EXACT in speed:
        at = x(speed[EXACT])
        out += [line(at, top, at, bottom, stroke_dasharray="3 4", stroke="var(--faint)", kind="mark"),
                label("exact", at + 6, bottom - 7)]
    best = frontier([(s, v.value) for _, s, v in points], faster_is_higher)
    if len(best) > 1 and compares:
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in best)
        out.append(tag("path", fill="none", stroke="var(--accent)", stroke_dasharray="5 4", opacity=0.7, d=path))
    for row, at_speed, value in points:
        colour, at = colour_of(row), x(at_speed)
        if not math.isnan(value.low):
            out.append(bar(at, y(value.low), at, y(value.high), colour))
        side = -1 if at + 12 + LETTER * len(row.run) > width else 1
        out += [dot(at, y(value.value), 6, colour),
                label(row.run, at + 12 * side, y(value.value) - 8, "start" if side > 0 else "end", strong=True)]
    return picture(width, height, out, "Quality over speed")
