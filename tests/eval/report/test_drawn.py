"""Where the report's charts put their dots and intervals, and how its films make a clip smaller."""
import math
import re

import numpy as np
import pytest

from lowbit_video.eval.report import charts, films
from lowbit_video.eval.report.bootstrap import Interval
from lowbit_video.eval.report.summary import Cell, Row

NAN = math.nan


def row(place, *over):
    """A candidate whose error is so many times the floor's."""
    cell = Cell(Interval(30.0, NAN, NAN, 1), times_floor=Interval(*over, 2))
    return Row(f"run{place}", 1, 0, 1.0, {"psnr": cell}, place=place)


def numbers(text, tag, *names):
    """Of every element of that tag the attributes' numbers."""
    found = [re.findall(rf"<{tag} [^>]*>", text)][0]
    return [tuple(float(re.search(rf' {name}="([-\d.]+)"', one)[1]) for name in names) for one in found]


def test_a_whisker_lies_on_its_columns_axis():
    drawn = charts.whisker(Interval(5.0, 4.0, 8.0, 3), 0.0, 10.0, "--c1")  # 110 units of 118 for the span
    assert numbers(drawn, "circle", "cx", "cy", "r") == [(59.0, 7.0, 4.0)]
    assert numbers(drawn, "line", "x1", "x2") == [(0.0, 118.0), (48.0, 92.0)]
    alone = charts.whisker(Interval(0.0, NAN, NAN, 1), 0.0, 10.0, "--c1")
    assert numbers(alone, "circle", "cx") == [(4.0,)] and len(numbers(alone, "line", "x1")) == 1


def test_bounds_hold_values_and_intervals_with_some_room():
    cell = lambda *interval: Cell(Interval(*interval, 2))
    assert charts.bounds([cell(5.0, 4.0, 6.0), cell(10.0, NAN, NAN)]) == pytest.approx((3.76, 10.24))
    low, high = charts.bounds([cell(5.0, NAN, NAN)])
    assert low < 5 < high


def test_times_the_floor_are_drawn_on_a_logarithmic_axis():
    """From half the floor to 1.6 times the largest end, between 150 and 910 of 1080 units."""
    drawn = charts.floor_chart([row(0, 1.0, 0.8, 1.25), row(1, 10.0, 5.0, 20.0), row(2, 100.0, NAN, NAN)], "psnr")
    place = lambda times: 150 + 760 * math.log(times / 0.5) / math.log(160 / 0.5)
    rounded = lambda *times: tuple(round(place(one), 1) for one in times)
    assert numbers(drawn, "circle", "cx") == [rounded(1), rounded(10), rounded(100)]
    lines = numbers(drawn, "line", "x1", "x2")
    assert lines == [rounded(at, at) for at in (1, 10, 100)] + [rounded(0.8, 1.25), rounded(5, 20)]
    assert numbers(drawn, "rect", "x", "width") == [(150.0, round(place(1) - 150, 1))]
    assert charts.floor_chart([row(0, 0.0, 0.0, 0.0), row(1, math.inf, NAN, NAN)], "psnr") == ""


@pytest.mark.parametrize("place, colour", [(0, "--c0"), (7, "--c7"), (8, "--c0"), (9, "--c1")])
def test_a_candidates_colour_goes_by_its_place(place, colour):
    assert charts.colour_of(row(place, 1.0, NAN, NAN)) == colour
    assert [charts.colour_of(Row(run, 1, 0, 1.0, {}, place=3)) for run in ("exact", "floor")] == ["--ink", "--faint"]


def test_a_smaller_clip_is_the_mean_of_its_pixels():
    clip = np.random.default_rng(0).integers(0, 256, (2, 7, 8, 3), np.uint8)
    small = films.smaller(clip, 3)
    assert small.shape == (2, 2, 2, 3) and small.dtype == np.uint8
    for y in range(2):
        for x in range(2):
            block = clip[:, 3 * y:3 * y + 3, 3 * x:3 * x + 3].astype(float).mean((1, 2))
            np.testing.assert_array_equal(small[:, y, x], np.rint(block))
    assert films.smaller(clip, 1) is clip


@pytest.mark.parametrize("width, shown", [(560, 560), (562, 281), (1120, 560), (1122, 374)])
def test_wide_videos_are_shown_at_a_whole_part_of_their_size(width, shown):
    reel = films.make_reel({"exact": np.zeros((3, 8, width, 3), np.uint8), "a": np.zeros((3, 8, width, 3), np.uint8)}, 8)
    assert (reel.width, reel.height, reel.frames, reel.runs) == (shown, 8 // (width // shown), 3, ["exact", "a"])


def test_a_films_error_is_that_of_its_tiles():
    tiles = [np.full((2, 4, 6, 3), 100, np.uint8) for _ in range(3)]
    film = np.full((2, 8, 12, 3), 100, np.uint8)  # 2 x 2 places, the last one empty
    film[:, 4:, 6:] = 0
    assert films.film_error(film, tiles, 2) == 0
    film[:, :4, 6:], film[:, 4:, :6] = 97, 104  # the second and the third
    assert films.film_error(film, tiles, 2) == pytest.approx(math.sqrt((9 + 16) / 3))


def test_a_films_rate_factor_is_the_one_that_was_asked_for():
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    clips = {"exact": noise, "a": noise[::-1]}
    usual, small = films.make_reel(clips, 8), films.make_reel(clips, 8, crf=40)
    assert films.make_reel(clips, 8, crf=films.FILM_CRF).film == usual.film
    assert len(small.film) < len(usual.film) / 2 and small.levels > usual.levels > 0
