"""Prices and the allocation: each point of the curve is the best for its cost, budgets are met by the least of them."""
import itertools
import json

import numpy as np
import pytest

from lowbit_video import Recipe
from lowbit_video.eval.calibrate.costs import TABLE, costs_of
from lowbit_video.eval.calibrate.measure import Measured, sampled
from lowbit_video.eval.calibrate.run import Problem, rules_of
from lowbit_video.eval.calibrate.solve import MOST_DB, Budget, db, solve
from lowbit_video.hook.recipe.table import table_of

COSTS = np.array([1.0, 1.1, 1.5, 2.0])


def problem(seed=0, cells=5):
    rng = np.random.default_rng(seed)
    errors = 10 ** rng.uniform(-6, -2, (4, cells))
    errors[2] = 0
    errors[3] = rng.uniform(0, 1e-7, cells)  # dearer than no error at all
    return errors, np.full(cells, 1 / cells) * rng.uniform(0.5, 1.5, cells)


def every_allocation(errors, shares):
    for rungs in itertools.product(range(len(COSTS)), repeat=errors.shape[1]):
        rungs = np.array(rungs)
        yield float(shares @ COSTS[rungs]), float(errors[rungs, np.arange(len(rungs))].sum())


@pytest.mark.parametrize("seed", range(3))
def test_every_point_of_the_curve_is_the_best_for_its_cost(seed):
    errors, shares = problem(seed)
    curve = solve(errors, COSTS, shares, Budget(cost=10)).curve
    points = list(every_allocation(errors, shares))
    for cost, error in curve:
        best = min(e for c, e in points if c <= cost + 1e-9)
        assert error == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert [c for c, _ in curve] == sorted(c for c, _ in curve) and curve[-1][1] == pytest.approx(0, abs=1e-12)


def test_an_error_is_met_at_the_least_cost_and_a_cost_with_the_least_error():
    errors, shares = problem()
    curve = solve(errors, COSTS, shares, Budget(cost=10)).curve
    for budget in (Budget(error_db=db(curve[2][1]) - 0.001), Budget(cost=curve[2][0] + 1e-6)):
        got = solve(errors, COSTS, shares, budget)
        assert (got.cost, got.error) == pytest.approx(curve[2])
        assert np.allclose(got.curve, curve)
        assert shares @ COSTS[got.rungs] == pytest.approx(got.cost)
        assert errors[got.rungs, np.arange(5)].sum() == pytest.approx(got.error)
    more = solve(errors, COSTS, shares, Budget(error_db=db(curve[2][1]) + 0.001))
    assert (more.cost, more.error) == pytest.approx(curve[3])
    lax = solve(errors, COSTS, shares, Budget(error_db=1))
    assert (lax.cost, lax.error) == pytest.approx(curve[0]) and np.allclose(lax.curve, curve)


def test_budgets_that_cannot_be_met_and_texts_that_are_none():
    errors, shares = problem()
    with pytest.raises(ValueError, match=r"a budget of 0.5x cannot be met: these rungs give at least "):
        solve(errors, COSTS, shares, Budget.parse("0.5x"))
    with pytest.raises(ValueError, match=r"a budget of 90dB cannot be met: these rungs give at most .* dB; name finer"):
        solve(errors[:2], COSTS[:2], shares, Budget.parse("90dB"))
    assert Budget.parse("45.5dB") == Budget(error_db=45.5) and str(Budget.parse("1.1x")) == "1.1x"
    for text in ("45", "dB", "0x", "1,1x", "-3dB"):
        with pytest.raises(ValueError, match="give decibels of the final latent"):
            Budget.parse(text)
    assert db(0) == MOST_DB and db(1e-4) == pytest.approx(40)


def test_prices_are_of_the_nearest_shape_and_its_fastest_kernel(tmp_path):
    row = lambda tokens, dim, precision, ms, causal=False: {"batch": 1, "heads": 2, "tokens": tokens, "head_dim": dim,
                                                            "causal": causal, "precision": precision, "total_ms": ms}
    rows = [row(1000, 64, "int8+fp8", 4.0), row(1000, 64, "int8+fp8", 2.0), row(1000, 64, "exact", 3.0),
            row(1000, 64, None, 1.0), row(1000, 64, "exact", 1.0, causal=True), row(1000, 64, "fp8+fp8", None),
            row(9000, 64, "int8+fp8", 1.0), row(9000, 64, "exact", 2.0), row(1000, 128, "int8+fp8", 1.0),
            row(1000, 128, "exact", 5.0), row(50, 64, "exact", 9.0)]
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"about": {"gpu": "a GPU"}, "rows": rows}))
    rungs = ["exact", "int8+fp8", "fp8+fp8"]
    got = costs_of(rungs, 50, 64, path)
    assert got.of == {"exact": 1.5, "int8+fp8": 1.0} and got.lacking == ("fp8+fp8",)
    assert got.said == "k.json of a GPU, 1000 tokens, head dim 64"
    assert costs_of(rungs, 4000, 64, path).of["exact"] == 2.0 and costs_of(rungs, 9000, 128, path).of["exact"] == 5.0
    path.write_text(json.dumps({"rows": rows[-1:]}))
    with pytest.raises(ValueError, match="k.json holds no time of int8"):
        costs_of(rungs, 50, 64, path)
    with pytest.raises(ValueError, match="no such file: .*none.json"):
        costs_of(rungs, 50, 64, tmp_path / "none.json")
    assert costs_of(rungs, 17776, 64, TABLE).of["exact"] > 1.2


@pytest.mark.parametrize("seed", range(4))
def test_rules_give_each_cell_its_rung(seed):
    rng = np.random.default_rng(seed)
    cells = rng.choice(["exact", "int8+fp8", "int8+fp16"], (3, 4, 4), p=[0.2, 0.6, 0.2])
    cells[:, :, 2:] = cells[:, :, :1]
    layers, edges = ["a", "b", "c"], [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    table = table_of(Recipe(rules_of(cells, layers, edges)).rules, dict.fromkeys(layers, 4), "r")
    for number, layer in enumerate(layers):
        for place, (start, _) in enumerate(edges):
            assert table.layers[layer].at(start).rungs == tuple(cells[number, place])


def test_rules_are_few():
    cells = np.full((4, 4, 2), "int8+fp8", object)
    cells[:, :1] = "exact"
    cells[1, :, :] = "int8+fp16"
    rules = rules_of(cells, list("abcd"), [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)])
    base, first, second = (rule.as_dict() for rule in rules)
    assert base == {"rung": "int8+fp8"} and second == {"layers": "b", "rung": "int8+fp16"}
    assert first == {"layers": ["a", "c", "d"], "steps": "0-0.25", "rung": "exact"}


def test_steps_begin_in_their_own_range_and_heads_count():
    ranges = [range(0, 2), range(2, 4), range(4, 6)]
    peaks = np.arange(1.0, 73).reshape(2, 3, 4, 3)
    one = Measured(np.ones((1, 2, 3, 4)) * np.arange(4), np.array([3.0, 2.0, 1.0]), peaks, 10, 64)
    other = Measured(one.errors * 3, one.gains, 73 - peaks, 10, 64)
    costs = type("C", (), {"of": {"exact": 1.5, "int8+fp8": 1.0}})()
    whole = Problem.of([one, other], ["int8+fp8"], costs, ranges, 6, by_head=True)
    for (start, end), steps in zip(whole.edges, ranges):
        assert all(start <= step / 6 < end for step in steps)
    assert whole.rungs == ["exact", "int8+fp8"] and not whole.errors[0].any()
    assert whole.errors[1, 1].tolist() == [[0, 6, 12, 18], [0, 4, 8, 12], [0, 2, 4, 6]]
    joined = Problem.of([one, other], ["int8+fp8"], costs, ranges, 6, by_head=False)
    assert np.array_equal(whole.peaks, np.maximum(peaks, 73 - peaks)) and joined.peaks.shape == (2, 3, 1, 3)
    assert joined.peaks[0, 0, 0].tolist() == [72, 71, 70] and joined.peaks[1, 2, 0].tolist() == [70, 71, 72]
    assert joined.errors.shape == (2, 2, 3, 1) and joined.errors[1, 0, :, 0].tolist() == [36, 24, 12]
    assert joined.uniform() == {"exact": (1.5, 0.0), "int8+fp8": (1.0, pytest.approx(144))}
    allocation = joined.solve(Budget(cost=1.0 + 0.5 / 3 + 1e-6))
    assert joined.names(allocation)[:, :, 0].tolist() == [["exact", "int8+fp8", "int8+fp8"]] * 2
    assert joined.paid(allocation).tolist() == [[1.5, 1.0, 1.0]] * 2 and joined.names(allocation).shape == (2, 3, 4)


def test_steps_that_are_sampled_lie_about_the_middle():
    assert sampled(range(4, 8), 1) == {6} and sampled(range(4, 8), 2) == {5, 7} and sampled(range(3, 5), 9) == {3, 4}
