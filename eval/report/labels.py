"""Names beside the points of a matplotlib chart, where nothing else lies."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # matplotlib is no requirement of the package
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
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


def name_points(axes: Axes, points: Sequence[Point], **look) -> list[Annotation]:
    """Write each point's name beside it, clear of all points, intervals and other names where that is possible.

    Args:
        axes: with everything but the names drawn and its limits as they will stay.
        look: of the text, as `Axes.annotate` takes it.
    Returns:
        The texts, in order.
    """
    axes.get_figure().draw_without_rendering()  # limits, ticks and sizes are settled
    taken, frame = [_interval(axes, point) for point in points], axes.get_window_extent()
    texts = []
    for point in points:
        text = axes.annotate(point.name, (point.x, point.y), xytext=(0, 0), textcoords="offset points", **look)
        best = min(PLACES, key=lambda place: _in_the_way(_put(text, place), taken, frame))  # of equals the first
        taken.append(_put(text, best))
        texts.append(text)
    return texts


def _put(text: Annotation, place: tuple[float, float, str, str]) -> Bbox:
    """Move a name to one of the places of its point; gives what it covers there, in pixels."""
    right, above, beside, under = place
    text.set(position=(right, above), ha=beside, va=under)
    return text.get_window_extent()


def _interval(axes: Axes, point: Point) -> Bbox:
    """What a point and its interval cover, in pixels."""
    from matplotlib.transforms import Bbox

    low, high = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
    return Bbox([low, high]).padded(CLEAR)


def _in_the_way(box: Bbox, taken: list[Bbox], frame: Bbox) -> float:
    """Square pixels of a box that others cover, each by itself, or that lie outside of the frame."""
    return sum(_shared(box, other) for other in taken) + box.width * box.height - _shared(box, frame)


def _shared(one: Bbox, other: Bbox) -> float:
    """Square pixels that lie in both."""
    part = one.intersection(one, other)
    return 0.0 if part is None else part.width * part.height
