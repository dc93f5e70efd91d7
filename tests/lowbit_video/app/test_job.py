"""A job's settings, at values that are not their defaults: each gets from the command line to where it counts."""
import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import Recipe  # noqa: E402
from lowbit_video.app import generate, ranks, run_pipeline  # noqa: E402
from lowbit_video.app.job import (  # noqa: E402
    DEFAULT_FPS,
    LONG_PROMPT,
    OTHER_PROMPT,
    SMALL_PROMPT,
    Job,
    add_arguments,
    fill,
    job_of,
    parse_modules,
)

OTHER = dict(model="a/folder", prompt="snow", negative_prompt="rain", precision="int4+fp8", fallback="exact",
             backend="reference", order="hilbert", steps=7, frames=17, height=96, width=160, fps=12.5, seed=11, guidance=2.5,
             device="cpu", dtype="float16", compile=True, compare=True, low_memory=True, ulysses_degree=3, ring_degree=5,
             cfg_degree=2, vae_degree=4, exchange="int4", exchange_output="int8", out="elsewhere")
"""A value of every setting but `modules` and `recipe`, none its default."""


def test_every_setting_comes_from_the_command_line():
    assert all(getattr(Job(), name) != value for name, value in OTHER.items())
    assert {*OTHER, "modules", "recipe"} == set(Job.__dataclass_fields__)
    words = []
    for name, value in OTHER.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert job_of(parser.parse_args([*words, "--modules", "a=fp16", "--modules", "b.*=exact"])) == Job(
        **OTHER, modules={"a": "fp16", "b.*": "exact"})
    assert job_of(parser.parse_args([])) == Job()


def test_a_recipe_stands_in_the_place_of_a_precision(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    job = job_of(parser.parse_args(["--recipe", "safe", "--modules", "a=fp16"]))
    assert job == Job(recipe="safe", modules={"a": "fp16"}) and job.hooked and job.attention == "recipe safe"
    assert Job(recipe="safe", precision="exact").hooked and Job(precision="int8+fp8").attention == "int8+fp8"
    with pytest.raises(ValueError, match="--precision int8\\+fp16 and --recipe safe are both given"):
        job_of(parser.parse_args(["--recipe", "safe", "--precision", "int8+fp16"]))
    with pytest.raises(ValueError, match="no such file: "):
        Job(recipe=str(tmp_path / "none.toml"))


def test_of_patterns_for_modules_the_last_one_given_stands_last():
    assert list(parse_modules(["a=fp16", "b=exact", "a=int8+fp16"]).items()) == [("b", "exact"), ("a", "int8+fp16")]


@pytest.mark.parametrize("name, right, wrong", [
    ("seed", (0, 2**32 - 1), (-1, 2**32)), ("guidance", (-1.0, 0.0, 1e30), (float("nan"), float("-inf"))),
    *((name, (1, 9, 2**31 - 1), (0, -1, 2**31, 10**400)) for name in (
        "steps", "frames", "height", "width", "ulysses_degree", "ring_degree", "cfg_degree", "vae_degree")),
    ("fps", (0.5, 8), (0, -1.0, float("inf")))])
def test_both_sides_of_every_limit(name, right, wrong):
    for value in right:
        assert getattr(Job(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(ValueError, match=name):
            Job(**{name: value})


@pytest.mark.parametrize("precision, modules, hooked", [
    ("exact", {}, False), ("fp16", {}, False), ("exact", {"a": "int8+fp16"}, True), ("int8+fp16", {}, True)])
def test_a_job_is_hooked_where_any_module_is(precision, modules, hooked):
    assert Job(precision=precision, modules=modules).hooked == hooked


def test_a_folder_named_as_the_random_model_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Job(model="random").random and not Job().random
    (tmp_path / "random").mkdir()
    assert not Job(model="random").random


STORED = dict(num_inference_steps=3, guidance_scale=1.5, num_frames=33, height=48, width=80, fps=16, prompt="hail")


@pytest.mark.parametrize("name, stored", [("steps", 3), ("guidance", 1.5), ("frames", 33), ("height", 48), ("width", 80),
                                          ("fps", 16), ("prompt", "hail")])
def test_a_folder_fills_what_a_job_leaves_open_and_no_more(name, stored, tmp_path):
    (tmp_path / "generation.json").write_text(json.dumps(STORED))
    open_but_for = {key: value for key, value in OTHER.items() if key != name}
    assert getattr(fill(Job(**open_but_for), tmp_path), name) == stored
    assert fill(Job(**OTHER), tmp_path) == Job(**{**OTHER, "model": str(tmp_path)})


@pytest.mark.parametrize("world, prompt", [("shapes", SMALL_PROMPT), ("scenes", LONG_PROMPT), ("other", OTHER_PROMPT)])
def test_what_no_folder_says_has_a_default(world, prompt, tmp_path):
    (tmp_path / "generation.json").write_text(json.dumps({"world": world}))
    filled = fill(Job(), tmp_path)
    assert (filled.fps, filled.prompt, filled.steps, filled.guidance) == (DEFAULT_FPS, prompt, None, None)


class Pipe:
    """A pipeline that keeps what it was called with."""

    def __init__(self, video=None):
        self.video = np.zeros((2, 4, 4, 3), np.float32) if video is None else video

    def __call__(self, *given, **named):
        self.called = given, named
        return SimpleNamespace(frames=[self.video], timings={"denoise": 3.0}, memory={"denoise": 9.0})


def test_the_pipeline_is_called_with_every_setting(monkeypatch):
    monkeypatch.setattr(run_pipeline, "coverage", lambda pipe: ("coverage of", pipe))
    pipe = Pipe()
    done = run_pipeline.run_pipeline(pipe, Job(**OTHER), progress=False)
    assert pipe.called == (("snow",), dict(seed=11, output_type="np", progress=False, negative_prompt="rain",
                                           num_inference_steps=7, guidance_scale=2.5, num_frames=17, height=96, width=160))
    assert done.video is pipe.video and (done.seconds, done.memory) == ({"denoise": 3.0}, {"denoise": 9.0})
    assert done.coverage == ("coverage of", pipe)
    run_pipeline.run_pipeline(pipe, Job(prompt="hail", guidance=0.0))
    assert pipe.called == (("hail",), dict(seed=0, output_type="np", progress=True, guidance_scale=0.0))


@pytest.mark.parametrize("given, device, config, dtype", [
    ("auto", "cpu", {"use_rotary_positional_embeddings": True}, "float32"), ("float16", "cpu", {}, "float16"),
    ("auto", "gpu:0", {"use_rotary_positional_embeddings": True}, "bfloat16"), ("bfloat16", "gpu:0", {}, "bfloat16"),
    ("auto", "gpu:0", {"use_rotary_positional_embeddings": False}, "float16"), ("auto", "gpu:0", {}, "float16")])
def test_the_dtype_is_that_in_which_a_model_was_published(given, device, config, dtype, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text("{}")
    assert run_pipeline.resolve_dtype(given, device, str(tmp_path)) == dtype


def test_a_pipeline_is_loaded_and_compiled_as_the_job_says(monkeypatch):
    asked = []
    pipe = SimpleNamespace(compile=lambda: asked.append("compile"))
    monkeypatch.setattr(run_pipeline.pipelines, "load", lambda *given, **named: (asked.append((given, named)), pipe)[1],
                        raising=False)
    loaded, seconds = run_pipeline.load_pipeline(Job(**OTHER), "float16", "gpu:1")
    assert loaded is pipe and seconds >= 0
    assert asked == [(("a/folder",), dict(dtype="float16", device="gpu:1", low_memory=True)), "compile"]
    run_pipeline.load_pipeline(Job(model="b"), "float32", "cpu")
    assert asked[2:] == [(("b",), dict(dtype="float32", device="cpu", low_memory=False))]


def test_seconds_of_a_step():
    assert run_pipeline.seconds_line({"text_encode": 1.0, "denoise": 3.0}, 4) == (
        "seconds: text encode 1.00, denoise 3.00 (0.75 a step)")
    assert run_pipeline.seconds_line({"load": 1.0}, 4) == run_pipeline.seconds_line({"load": 1.0}, None) == "seconds: load 1.00"


def test_peak_memory_by_stage_or_why_there_is_none():
    assert run_pipeline.memory_line({"text_encode": 9.004, "denoise": 13.0}, "gpu:0") == (
        "peak memory, GiB: text encode 9.00, denoise 13.00")
    assert run_pipeline.memory_line({}, "cpu") == "peak memory: Paddle does not count it on cpu"


class Enough(Exception):
    """Ends a job where its run would begin."""


def until_it_runs(job, monkeypatch):
    """(the job that runs, what `apply` was called with): all but the work itself."""
    jobs, applied, ordered = [], [], []

    def runs(pipe, job):
        jobs.append(job)
        raise Enough

    monkeypatch.setattr(generate, "load_pipeline", lambda *given: ("pipe", 1.0))
    monkeypatch.setattr(generate, "order_tokens", lambda *given: ordered.append(given))
    monkeypatch.setattr(generate, "apply", lambda *given, **named: applied.append((given, named)))
    monkeypatch.setattr(generate, "run_pipeline", runs)
    with pytest.raises(Enough):
        generate._make(job, "cpu", None, lambda text: None)
    assert ordered == [("pipe", job.order)]
    return jobs[0], applied


@pytest.mark.parametrize("precision, applied", [("int4+fp8", "int4+fp8"), ("exact", None)])
def test_the_hook_gets_every_choice(precision, applied, tmp_path, monkeypatch):
    job = Job(**{**OTHER, "model": str(tmp_path), "precision": precision}, modules={"a": "int8+fp16"})
    assert until_it_runs(job, monkeypatch)[1] == [
        (("pipe", applied, {"a": "int8+fp16"}), dict(fallback="exact", backend="reference"))]
    assert until_it_runs(Job(model=str(tmp_path), precision="exact"), monkeypatch)[1] == []


def test_the_hook_gets_the_recipe(tmp_path, monkeypatch):
    job = Job(**{**OTHER, "model": str(tmp_path)}, recipe="fast", modules={"a": "int8+fp16"})
    assert until_it_runs(job, monkeypatch)[1] == [
        (("pipe", Recipe.load("fast"), {"a": "int8+fp16"}), dict(fallback="exact", backend="reference"))]


@pytest.mark.parametrize("given, steps", [(None, generate.RANDOM_STEPS), (3, 3)])
def test_a_random_model_takes_few_steps_unless_told_otherwise(given, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "_random_model", lambda *given: tmp_path)
    assert until_it_runs(Job(model="random", steps=given), monkeypatch)[0].steps == steps


@pytest.mark.parametrize("cfg, guidance, shared", [(None, 2.5, None), (None, None, None), (None, 1.0, 1), (None, 0.0, 1),
                                                   (2, 1.0, 2), (None, 1.01, None)])
def test_ranks_share_as_the_job_says_and_no_halves_where_there_is_no_guidance(cfg, guidance, shared, monkeypatch):
    monkeypatch.setattr(ranks, "parallelize", lambda *given: given)
    job = Job(**{**OTHER, "cfg_degree": cfg, "guidance": guidance})
    assert ranks.share("pipe", job, "wire") == ("pipe", 3, 5, shared, 4, "int4", "int8", "wire")


@pytest.mark.parametrize("degrees, count", [
    (dict(ulysses_degree=2, ring_degree=3), 6), (dict(vae_degree=3), 3), (dict(ulysses_degree=2, vae_degree=5), 5),
    (dict(cfg_degree=2, ring_degree=2), 4), (dict(exchange="int8"), 2), (dict(exchange_output="int8"), 2)], ids=str)
def test_a_job_for_several_ranks_says_how_many_to_launch(degrees, count, monkeypatch):
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    with pytest.raises(ValueError, match=rf"--devices {','.join(map(str, range(count)))} .*--nproc_per_node {count} in place"):
        ranks.check_launched(Job(**degrees))
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    ranks.check_launched(Job(**degrees))


def test_one_rank_may_be_asked_for(monkeypatch):
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    ranks.check_launched(Job(ulysses_degree=1, ring_degree=1, cfg_degree=1, vae_degree=1))
