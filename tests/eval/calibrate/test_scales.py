"""The scheme "seed": larger Q, K and V get more bits, by fixed thresholds or by thresholds that meet a budget."""
import numpy as np
import pytest

from lowbit_video.eval.calibrate.costs import bits_of
from lowbit_video.eval.calibrate.run import Plan, Problem, check_budget
from lowbit_video.eval.calibrate.scales import RUNGS, choose, rungs_of, scales_of
from lowbit_video.eval.calibrate.solve import Budget

BITS = np.array([16.0, 8.0, 4.0])


def test_thresholds_are_those_of_the_source():
    assert rungs_of(np.array([0.0, 0.05, 0.0501, 0.2, 0.2001, 9])).tolist() == [2, 2, 1, 1, 0, 0]
    peaks = 127 * np.array([[0.3, 0.3, 0.06], [0.1, 0.01, 0.01], [0.0, 0.1, 0.2]])  # means 0.22, 0.04 and 0.1
    assert scales_of(peaks) == pytest.approx([0.22, 0.04, 0.1])
    assert choose(peaks, np.full(3, 1 / 3), BITS).tolist() == [0, 2, 1]


@pytest.mark.parametrize("most", [4, 5.5, 7, 10, 15.9, 16, 40])
def test_a_budget_of_bits_is_met_as_nearly_as_thresholds_can(most):
    rng = np.random.default_rng(1)
    peaks, shares = rng.uniform(1, 30, (20, 3)), rng.dirichlet(np.ones(20))
    rungs = choose(peaks, shares, BITS, most)
    paid = lambda rungs: shares @ BITS[rungs]
    assert paid(rungs) <= most + 1e-6
    edges = np.sort(np.concatenate([scales_of(peaks) / 0.2, scales_of(peaks) / 0.05]))
    between = np.concatenate([[0.0], (edges[1:] + edges[:-1]) / 2, [2 * edges[-1]]])
    every = [rungs_of(scales_of(peaks), factor) for factor in between]
    assert paid(rungs) == pytest.approx(max(paid(one) for one in every if paid(one) <= most), abs=1e-9)
    assert choose(peaks[:4], np.full(4, 0.25), BITS, 4.0).tolist() == [2, 2, 2, 2]  # just as many as there may be
    assert (np.diff(rungs[np.argsort(scales_of(peaks))]) <= 0).all()  # none has fewer bits than a smaller one


def test_what_cannot_be_met_or_meant_is_named():
    with pytest.raises(ValueError, match="3bit cannot be met: int4.fp16 everywhere has 4 bits"):
        choose(np.ones((2, 3)), np.full(2, 0.5), BITS, 3)
    with pytest.raises(ValueError, match="unknown scheme 'sead'; there are: measured, seed"):
        Plan(scheme="sead")
    with pytest.raises(ValueError, match="rungs are exact, int8.fp16, int8.fp8; the scheme \"seed\" chooses among exact"):
        Plan(scheme="seed")
    for budget in (Budget(cost=1.0), Budget(error_db=40.0)):
        with pytest.raises(ValueError, match=f"budget is {budget}; the scheme"):
            check_budget(budget, "seed")
    with pytest.raises(ValueError, match="no budget"):
        check_budget(None, "measured")
    for scheme, budget in (("seed", None), ("seed", Budget(bits=6.0)), ("measured", Budget(bits=6.0))):
        check_budget(budget, scheme)


def test_bits_are_those_of_both_operands():
    assert bits_of(["exact", "fp16", "int8/int4+fp8", "int2+fp16", "fp8+fp8", "int4+fp8 rotate"]).of == {
        "exact": 16, "fp16": 16, "int8/int4+fp8": 6, "int2+fp16": 2, "fp8+fp8": 8, "int4+fp8 rotate": 4}


def test_pooled_keys_have_no_bits():
    costs = bits_of(["int8+fp8 pooled 0.5 always 6", "int8+fp8", "int4+fp8 pooled 1", "int4+fp8 pooled 0.3"])
    assert costs.of == {"int8+fp8": 8, "int4+fp8 pooled 1": 4}
    assert costs.lacking == ("int8+fp8 pooled 0.5 always 6", "int4+fp8 pooled 0.3") and costs.unit == "bits"
    with pytest.raises(ValueError, match="rungs are int8.fp8 pooled 0.5; those with pooled keys have no bits"):
        bits_of(["int8+fp8 pooled 0.5"])


def test_the_rules_cells_are_paid_and_err_by_the_measurement():
    errors = np.array([0.0, 1.0, 10.0])[:, None, None, None] * np.arange(1, 9).reshape(1, 2, 2, 2)  # [R, L, G, H]
    peaks = 127 * np.array([0.04, 0.06, 0.21, 0.04, 0.04, 0.04, 0.06, 0.06]).reshape(2, 2, 2, 1).repeat(3, -1)
    problem = Problem(list(RUNGS), errors, BITS, [(0.0, 0.25), (0.25, 1.0)], 2, peaks)
    by = problem.by_scales(None)
    assert by.rungs.tolist() == [2, 1, 0, 2, 2, 2, 1, 1]
    assert by.error == 10 + 2 + 0 + 40 + 50 + 60 + 7 + 8
    assert by.cost == pytest.approx(((4 + 8 + 4 + 4) * 0.25 + (16 + 4 + 8 + 8) * 0.75) / 4)
    best = problem.solve(Budget(bits=by.cost))
    assert best.error < by.error and best.cost <= by.cost and by.curve[0] == (4.0, 360.0) and by.curve[-1] == (16.0, 0.0)
    fewer = problem.by_scales(Budget(bits=5.0))
    assert fewer.cost <= 5 and (fewer.rungs >= by.rungs).all()
