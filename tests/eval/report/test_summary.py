"""Bootstrap and summary: intervals that cover, ratios to the floor, verdicts, failures, unfinished prompts."""
import numpy as np
import pytest

from lowbit_video.eval.report.bootstrap import Interval, bootstrap, draws, mean, ratio_of_means
from lowbit_video.eval.report.groups import by_group
from lowbit_video.eval.report.summary import ABOVE, CLEARLY_ABOVE, FAILED, UNKNOWN, WITHIN, summarise, verdict_of


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(1.0, (100, 20))
    covered = [(i := bootstrap(mean, s)).low <= 1 <= i.high for s in samples]
    assert 0.84 <= np.mean(covered) <= 0.99  # percentile intervals of 20 skewed values fall a little short of 95 %


def test_bootstrap_is_reproducible_and_honest_about_one_prompt():
    values = np.arange(8.0)
    assert bootstrap(mean, values).value == 3.5
    uneven = np.geomspace(1, 9, 8)  # of whose draws no two have one mean
    assert bootstrap(mean, uneven) == (interval := bootstrap(mean, uneven))
    assert [interval.low, interval.high] == pytest.approx(np.quantile(uneven[draws(8)].mean(axis=1), [0.025, 0.975]))
    assert np.isnan(bootstrap(mean, [1.0]).low)
    for bad in ([], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="bootstrap needs"):
            bootstrap(mean, bad)
    with pytest.raises(ValueError, match="bootstrap needs"):
        bootstrap(ratio_of_means, [1.0, 2.0], [1.0])


def test_columns_are_drawn_together():
    """Prompts that differ by factors of ten, and a ratio that is two on each: there is nothing that it could be but two."""
    bottom = np.logspace(-2, 2, 12)
    times = bootstrap(ratio_of_means, 2 * bottom, bottom)
    assert times.value == times.low == times.high == 2.0
    nearly = bootstrap(ratio_of_means, 2 * bottom * np.linspace(0.9, 1.1, 12), bottom)
    assert 1.8 < nearly.low < nearly.value < nearly.high < 2.2


@pytest.mark.parametrize("low, value, verdict", [
    (0.99, 3.0, WITHIN), (1.01, 3.0, ABOVE), (1.99, 5.0, ABOVE), (2.01, 5.0, CLEARLY_ABOVE), (float("nan"), 9.0, UNKNOWN)])
def test_a_verdict_goes_by_the_lower_end(low, value, verdict):
    assert verdict_of(Interval(value, low, 2 * value, 8)) == verdict
    assert verdict_of(None) == UNKNOWN


@pytest.mark.filterwarnings("error")
def test_a_floor_of_nothing_gives_infinity_without_a_warning():
    times = bootstrap(ratio_of_means, np.arange(8.0), np.zeros(8))
    assert times.value == times.low == times.high == np.inf
    mixed = bootstrap(ratio_of_means, np.ones(8), np.eye(8)[0])  # draws without the first prompt divide by nothing
    assert mixed.value == 8.0 and mixed.high == np.inf and np.isfinite(mixed.low)


def lines(psnr_by_run, prompts=6, flicker=2.0, seeds=(0,)):
    out = []
    for i in range(prompts):
        for seed in seeds:
            for run, psnr in psnr_by_run.items():
                figures = {"flicker": flicker + 0.01 * i + (0 if run == "exact" else 0.001)}
                if run != "exact":
                    figures["psnr"] = psnr + 0.3 * i
                out.append({"kind": "video", "prompt": f"p{i}", "seed": seed, "run": run, "seconds": 2.0, "figures": figures})
    return out


def test_times_the_floor_is_a_ratio_of_errors():
    summary = summarise(lines({"exact": None, "floor": 80.0, "same": 80.0, "worse": 60.0}), ["worse", "same"])
    assert [row.run for row in summary.rows] == ["exact", "floor", "worse", "same"]
    assert summary.figures[0] == "psnr"
    worse, same = summary.row("worse"), summary.row("same")
    assert worse.cells["psnr"].times_floor.value == pytest.approx(10.0)  # 20 dB are ten times the error
    assert worse.verdict == CLEARLY_ABOVE and same.verdict == WITHIN
    assert same.cells["psnr"].value.low < same.cells["psnr"].value.value < same.cells["psnr"].value.high
    assert same.cells["flicker"].change.value == pytest.approx(0.001)
    assert same.cells["flicker"].times_floor.value == pytest.approx(1.0)
    assert "psnr" not in summary.row("exact").cells


def test_seeds_of_a_prompt_are_one_sample():
    one, two = (summarise(lines({"exact": None, "floor": 80.0, "x": 60.0}, seeds=s)) for s in ((0,), (0, 1)))
    assert two.row("x").cells["psnr"].value == one.row("x").cells["psnr"].value


def test_an_unfinished_prompt_stays_out_and_a_failure_is_told():
    data = lines({"exact": None, "floor": 80.0, "x": 60.0})
    assert summarise(data[:-1]).prompts == [f"p{i}" for i in range(5)]
    del data[-1]["figures"]
    data[-1]["error"] = "video holds 3 values that are NaN or inf"
    row = summarise(data).row("x")
    assert row.verdict == FAILED and row.failed == 1 and row.cells["psnr"].value.prompts == 5
    with pytest.raises(ValueError, match="no prompt has all its videos"):
        summarise(data[:2] + data[5:6])


def test_one_prompt_claims_nothing():
    assert summarise(lines({"exact": None, "floor": 80.0, "x": 30.0}, prompts=1)).row("x").verdict == UNKNOWN


def test_sets_are_compared_by_their_features():
    data = lines({"exact": None, "floor": 80.0, "x": 60.0})
    rng = np.random.default_rng(0)
    for line in data:
        line["features"] = {"fvd": list(rng.standard_normal(5) + (3 if line["run"] == "x" else 0))}
    summary = summarise(data)
    assert summary.row("x").cells["fvd"].value.value > summary.row("floor").cells["fvd"].value.value > 0


def test_groups_stand_on_their_own_finished_prompts():
    made = lines({"exact": None, "floor": 90.0, "low": 40.0}, prompts=5)
    for line in made:
        number = int(line["prompt"][1:])
        line["group"] = ("plain", "striped", "dotted")[(number > 1) + (number > 3)]
        if line["run"] == "low" and number == 3:
            line["figures"]["psnr"] = 1.0
    whole = [line for line in made if not (line["run"] == "low" and line["group"] == "dotted")]  # not finished
    groups = by_group(whole, ["exact", "floor", "low"])
    assert list(groups) == ["plain", "striped"] and [len(g.prompts) for g in groups.values()] == [2, 2]
    assert groups["plain"].row("low").cells["psnr"].value.value > 39
    assert groups["striped"].row("low").cells["psnr"].value.value < 21
    assert [row.run for row in groups["plain"].rows] == ["exact", "floor", "low"]
    assert by_group([{k: v for k, v in line.items() if k != "group"} for line in made]) == {}
