"""The time that a long job says is left: after a finished run, and before anything is finished."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowbit_video.eval.compare import progress
from lowbit_video.eval.compare.progress import QUIET_S, Progress, clock

PIPE = SimpleNamespace(num_timesteps=8)


class Job:
    """A job of these runs on a clock that is set by hand."""

    def __init__(self, *runs):
        self.time, self.said = 0.0, []
        self.progress = Progress(runs, self.said.append, lambda: self.time)

    def step(self, step, seconds, pipe=PIPE):
        self.time += seconds
        values = {"latents": object()}
        assert self.progress.step(pipe, step, 999, values) is values

    def finish(self, run, seconds):
        self.time += seconds
        self.progress.done(run, seconds, "x")


def test_finished_runs_foretell_by_the_median_of_each():
    job = Job("exact", "a", "a", "b")
    job.finish("exact", 2.0)
    job.finish("a", 10.0)
    assert "[2/4]" in job.said[1] and "about 16 s left" in job.said[1]  # ten for the other a, the median of all for b
    assert [clock(s) for s in (5, 89, 600, 12000)] == ["5 s", "89 s", "10 min", "3 h 20 min"]
    assert [clock(s) for s in (89.9, 90, 89 * 60, 90 * 60)] == ["90 s", "2 min", "89 min", "1 h 30 min"]


def test_one_run_that_was_slow_foretells_nothing():
    job = Job("a", "a", "a", "a")
    for seconds in (10.0, 100.0, 12.0):
        job.finish("a", seconds)
    assert "about 12 s left" in job.said[-1]


def test_the_first_steps_foretell_before_anything_is_finished():
    job = Job("exact", "a", "a", "b")
    job.step(0, 24.0)  # 8 steps of 24 s each, four times, without this one
    assert job.said == ["[1/4] exact: step 1 of 8 after 24 s, about 12 min left, as the first steps foretell it"]
    job.step(1, 6.0)
    assert len(job.said) == 1  # not a line a step
    job.step(2, 15.0)  # 15 s each
    assert job.said[1].startswith("[1/4] exact: step 3 of 8 after 45 s, about 7 min left")


def test_within_a_slow_run_what_is_finished_foretells():
    job = Job("exact", "a", "a", "b")
    job.finish("exact", 50.0)
    job.finish("a", 100.0)
    job.progress.begin("a")
    job.step(0, QUIET_S)
    assert job.said[-1] == "[3/4] a: step 1 of 8 after 20 s, about 3 min left"  # 80 of this a, and b's 75: 155 s
    job.step(7, 200.0)
    assert job.said[-1].endswith("about 75 s left")  # later than foretold, and never less than nothing


def test_quick_runs_and_pipelines_that_do_not_say_their_steps_add_no_lines():
    job = Job("exact", "a")
    job.step(0, QUIET_S - 1)
    job.step(1, QUIET_S, pipe=SimpleNamespace())
    assert not job.said


def test_comparing_and_recording_layers_say_how_far_a_slow_run_is(tmp_path, monkeypatch):
    pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from toy_pipeline import ToyPipeline

    from lowbit_video.eval.compare.layers import measure_layers
    from lowbit_video.eval.compare.paired import compare
    from lowbit_video.eval.compare.settings import Settings

    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    pipe, said, settings = ToyPipeline(layers=1), [], Settings("toy", steps=2)
    pipe.num_timesteps = 2
    compare(pipe, ["a red ball"], ["int8+fp16"], tmp_path, settings=settings, metrics=["psnr"], say=said.append)
    starts = [line.split(",")[0].partition(" after ")[0] for line in said]
    assert starts[:2] == ["[1/3] exact: step 1 of 2", "[1/3] exact: step 2 of 2"]
    assert starts[3] == "[2/3] floor: step 1 of 2" and starts[6] == "[3/3] int8+fp16: step 1 of 2" and len(said) == 9
    said.clear()
    measure_layers(pipe, "a red ball", ["int8+fp16"], settings=settings, measured_shares=False, say=said.append)
    assert said[0].startswith("[1/2] record: step 1 of 2") and said[3].startswith("[2/2] floor: step 1 of 2") and len(said) == 6
