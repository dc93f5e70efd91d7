"""Names beside the points of a chart: clear of one another, of points and intervals, and inside."""
import pytest

pytest.importorskip("matplotlib", reason="matplotlib draws the charts")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from lowbit_video.eval.report.labels import CLEAR, Point, name_points  # noqa: E402


@pytest.fixture
def axes():
    """0..10 both ways over 400 x 300 pixels, at 100 of them an inch."""
    figure = Figure(figsize=(5, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes([0.1, 0.125, 0.8, 0.75])
    axes.set(xlim=(0, 10), ylim=(0, 10))
    return axes


def point(name, x, y, spread=0.0):
    return Point(name, x, y, y - spread, y + spread)


def named(axes, *points):
    """Boxes of the names, after a look that they are these, at these points, and inside."""
    texts = name_points(axes, points, fontsize=8)
    assert [(text.get_text(), text.xy) for text in texts] == [(p.name, (p.x, p.y)) for p in points]
    assert texts == list(axes.texts), "one text a point"
    axes.get_figure().canvas.draw()
    boxes, frame = [text.get_window_extent() for text in texts], axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    return boxes


def place(axes, box, point):
    """Where a name stands of its point: "right above", ..."""
    x, y = axes.transData.transform((point.x, point.y))
    across = "right" if box.x0 > x else "left" if box.x1 < x else "over"
    return f"{across} {'above' if box.y0 > y else 'below' if box.y1 < y else 'beside'}"


def apart(one, other):
    return one.x1 <= other.x0 or other.x1 <= one.x0 or one.y1 <= other.y0 or other.y1 <= one.y0


def test_a_name_with_room_stands_right_of_its_point_and_above(axes):
    points = point("int8+fp8", 3, 5, 1), point("int8+fp16", 3, 8)
    assert [place(axes, box, p) for box, p in zip(named(axes, *points), points)] == ["right above"] * 2


def test_at_an_edge_it_stands_on_the_other_side(axes):
    points = point("at the right", 9.8, 5), point("at the top", 2, 9.9), point("in the corner", 9.9, 9.8)
    assert [place(axes, box, p) for box, p in zip(named(axes, *points), points)] == [
        "left above", "right below", "left below"]


def test_two_that_are_as_good_at_the_two_sides_do_not_lie_over_one_another(axes):
    points = point("exact (FlashAttention-4)", 5, 8, 1), point("exact (cuDNN)", 9.7, 7.95, 1)
    one, other = named(axes, *points)
    assert apart(one, other)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_name_leaves_anothers_interval_free(axes, order):
    points = point("int8+fp8", 4, 5), point("int8+fp16", 4.8, 7, 2.5)
    boxes = named(axes, *(points[i] for i in order))
    x, bottom = axes.transData.transform((4.8, 4.5))
    _, top = axes.transData.transform((4.8, 9.5))
    for box in boxes:
        assert box.x1 <= x - CLEAR or box.x0 >= x + CLEAR or box.y1 <= bottom - CLEAR or box.y0 >= top + CLEAR
    assert apart(*boxes)


def test_where_no_place_is_free_the_least_covered_is_taken(axes):
    """Intervals through both sides, of which the left one ends within the height of a name above the point."""
    to_pixels, own = axes.transData.transform, point("a name", 5, 5)
    x, y = to_pixels((5, 5))
    (left, end), (right, _) = axes.transData.inverted().transform([(x - 30, y + 10), (x + 30, 0)])
    *_, box = [text.get_window_extent() for text in name_points(
        axes, [Point("", left, 5, 0, end), Point("", right, 5, 0, 10), own], fontsize=8)]
    assert place(axes, box, own) == "left above"
    assert box.x0 < to_pixels((left, 0))[0] < box.x1 and box.y0 < to_pixels((0, end))[1] < box.y1, "it is covered a little"


def test_limits_stay(axes):
    named(axes, point("a rather long name that hardly fits", 6, 5), point("another", 1, 1))
    assert axes.get_xlim() == (0, 10) and axes.get_ylim() == (0, 10)
