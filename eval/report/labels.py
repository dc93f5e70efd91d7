"""Names beside the points of a matplotlib chart, where nothing else lies."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # matplotlib is no requirement of the package
    from matplotlib.axes import Axes
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

PLACES = ((8, 5, "left", "bottom"), (-8, 5, "right", "bottom"), (8, -5, "left", "top"), (-8, -5, "right", "top"))
"""Where a name may stand, the first that is free: dots right of and above its point, and which of its sides is nearest."""
CLEAR = 2.0  # pixels about a point or interval that a name leaves free


class Point(NamedTuple):
    """A point of a chart, in its units, with an interval of y (both ends y where there is none)."""

    name: str
    x: float
    y: float
    low: float
    high: float


def name_points(axes: Axes, points: Sequence[Point], **look) -> list[Text]:
    """Write each point's name beside it, clear of all points, intervals and other names where that is possible.

    Args:
        axes: with everything but the names drawn and its limits as they will stay.
        look: of the text, as `Axes.annotate` takes it.
    Returns:
        The texts, in order.
    """
    axes.get_figure().canvas.draw()  # limits, ticks and sizes are settled
    taken = [_interval(axes, point) for point in points]
    texts = []
    for point in points:
        tried = []
        for right, above, beside, under in PLACES:
            text = axes.annotate(point.name, (point.x, point.y), xytext=(right, above), textcoords="offset points", ha=beside,
                                 va=under, **look)
            box = text.get_window_extent()
            text.remove()
            tried.append((_covered(box, taken) + _outside(box, axes.get_window_extent()), box, text))
        _, box, text = min(tried, key=lambda place: place[0])  # of equals the first
        axes.add_artist(text)
        taken.append(box)
        texts.append(text)
    return texts


def _interval(axes: Axes, point: Point) -> Bbox:
    """What a point and its interval cover, in pixels."""
    from matplotlib.transforms import Bbox

    low, high = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
    return Bbox([low, high]).padded(CLEAR)


def _covered(box: Bbox, taken: list[Bbox]) -> float:
    """Square pixels of a box that others cover."""
    shared = (box.intersection(box, other) for other in taken)
    return sum(part.width * part.height for part in shared if part is not None)


def _outside(box: Bbox, frame: Bbox) -> float:
    """Square pixels of a box outside of a frame."""
    inside = box.intersection(box, frame)
    return box.width * box.height - (inside.width * inside.height if inside is not None else 0.0)
