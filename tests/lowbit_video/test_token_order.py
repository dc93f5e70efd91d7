"""Orders of tokens: permutations of any grid, undone by their inverses, whose runs are compact."""
import itertools

import numpy as np
import pytest

from lowbit_video.token_order import ORDERS, raster_order, token_order

GRIDS = [*itertools.product((1, 2, 3, 5), (1, 2, 4, 7), (1, 3, 8)), (13, 30, 45), (11, 48, 85), (1, 1, 300), (17, 2, 2)]


@pytest.mark.parametrize("order", ORDERS)
def test_every_grid_is_permuted_and_comes_back(order):
    for grid in GRIDS:
        places, back = token_order(order, *grid), raster_order(order, *grid)
        assert places.dtype == back.dtype == np.int64
        every = np.arange(np.prod(grid))
        assert np.array_equal(np.sort(places), every) and np.array_equal(every[places][back], every), grid


def steps_of(order, grid):
    """How far each token is from the one before, along all three axes together."""
    return np.abs(np.diff(np.stack(np.unravel_index(token_order(order, *grid), grid)))).sum(0)


@pytest.mark.parametrize("side", [2, 4, 16])
def test_the_curve_goes_to_a_neighbour_at_every_step_of_a_cube(side):
    assert (steps_of("hilbert", (side,) * 3) == 1).all()


@pytest.mark.parametrize("order, grid, places", [
    ("raster", (2, 1, 3), [0, 1, 2, 3, 4, 5]),
    ("hilbert", (2, 2, 2), [0, 1, 3, 2, 6, 7, 5, 4]),
    ("hilbert", (1, 3, 3), [0, 3, 4, 1, 2, 5, 8, 7, 6]),
    ("tiles", (1, 3, 3), [0, 1, 3, 4, 2, 5, 8, 6, 7]),
    ("tiles", (5, 3, 2), [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21, 4, 5, 10, 11, 16, 17, 22, 23,
                          28, 29, 24, 25, 26, 27]),
    ("tiles", (5, 2, 3), [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29,
                          24, 25, 27, 28])])
def test_small_grids(order, grid, places):
    assert token_order(order, *grid).tolist() == places


def spread(order, grid, run=64):
    """Mean distance, root of the mean square, of runs' tokens from their middle, in patches."""
    places = np.stack(np.unravel_index(token_order(order, *grid), grid), 1).astype(float)
    runs = places[:len(places) // run * run].reshape(-1, run, 3)
    return np.sqrt(((runs - runs.mean(1, keepdims=True)) ** 2).sum(2).mean(1)).mean()


@pytest.mark.parametrize("grid", [(13, 30, 45), (11, 48, 85), (21, 45, 80), (13, 32, 32)], ids=str)
def test_runs_are_compact(grid):
    """A cube of 64 has 1.94."""
    assert spread("raster", grid) > 9
    assert spread("tiles", grid) < 3.2 and spread("hilbert", grid) < 2.3


def test_an_order_is_made_once_and_cannot_be_written_over():
    assert token_order("hilbert", 3, 4, 5) is token_order("hilbert", 3, 4, 5)
    for order, find in itertools.product(ORDERS, (token_order, raster_order)):
        with pytest.raises(ValueError, match="read-only"):
            find(order, 2, 3, 4)[0] = 1


@pytest.mark.parametrize("given, error, words", [
    (("morton", 1, 2, 3), ValueError, "unknown token order 'morton'; there are: raster, tiles, hilbert"),
    ((None, 1, 2, 3), ValueError, "unknown token order None"),
    (("tiles", 1, 0, 3), ValueError, "height is 0; give at least 1"),
    (("hilbert", 1.5, 2, 3), TypeError, "frames is 1.5; give a whole number")], ids=str)
def test_what_is_no_order_or_grid_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        token_order(*given)
