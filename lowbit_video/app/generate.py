"""`lowbit-video generate`: one video of a prompt with low-bit attention, and on request its full-precision twin.

The job behind `examples/cogvideo.py` too. Everything that can be wrong with the request is found before
the long work; what was made, how long each stage took, what every attention module ran and how near the
twin is, is printed and written to report.json.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowbit_video import pipelines
from lowbit_video.eval.world.folder import world_of
from lowbit_video.pipelines.shared.small_model import model_or_small

from .. import Recipe, apply, order_tokens, remove
from ..files import write_json
from ..installing import pip_install
from .compare_twin import compare_twin
from .job import DEFAULT_FPS, EXACT, Job, add_arguments, fill, job_of
from .ranks import check_launched, connected, describe, is_first, make_once, share
from .run_pipeline import load_pipeline, memory_line, resolve_device, resolve_dtype, run_pipeline, seconds_line, timed
from .verdict import judge_video

RANDOM_STEPS = 10
"""Denoising steps of a random model, unless told otherwise: more do not make it better."""


def check_before(job: Job) -> None:
    """Everything that can fail late and can be known now: the output folder, packages, the encoder.

    Raises ImportError naming the package to install, ValueError for fps that no video has, OSError for a folder or a
    video that cannot be written.
    """
    if importlib.util.find_spec("paddle") is None:
        raise ImportError(f"the pipeline needs PaddlePaddle: {pip_install('cpu')}, or paddlepaddle-gpu from Paddle's own index")
    if job.compare and importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"--compare draws a plot and needs matplotlib: {pip_install('eval')}, or leave out --compare")
    fps = fill(job, job.model).fps if Path(job.model).is_dir() else job.fps
    pipelines.check_writable(Path(job.out) / "video.mp4", DEFAULT_FPS if fps is None else fps)


def make(job: Job, say: Any = print) -> dict[str, Any]:
    """Does the job: writes video.mp4, report.json and, with compare, the twin, both side by side and the figures.

    On several ranks each calls this, and rank 0 alone writes and says anything.
    returns: the report. Raises ValueError, OSError or ImportError for what cannot be done, as early as it
    can be known.
    """
    check_launched(job)
    job = replace(job, model=model_or_small(job.model))
    if is_first():
        check_before(job)
    device = resolve_device(job.device)
    with connected(device) as wire:
        return _make(job, device, wire, say if is_first() else lambda text: None)


def _make(job: Job, device: str, wire: Any, say: Any) -> dict[str, Any]:
    out = Path(job.out)
    random = job.random
    if random:
        job = replace(job, model=str(_random_model(out, wire, say)), steps=job.steps or RANDOM_STEPS)
    job = fill(job, job.model)
    dtype = resolve_dtype(job.dtype, device, job.model)
    say(f"model {job.model}, {dtype} on {device}; attention {job.attention if job.hooked else 'exact'}"
        + (", compiled" if job.compile else "") + (", low memory" if job.low_memory else ""))
    say(f"prompt: {job.prompt}")
    pipe, load_s = load_pipeline(job, dtype, device)
    order_tokens(pipe, job.order)
    if job.hooked:
        wanted = None if job.precision in EXACT else job.precision
        apply(pipe, wanted if job.recipe is None else Recipe.load(job.recipe), job.modules, fallback=job.fallback,
              backend=job.backend)
    parallel = None if wire is None else share(pipe, job, wire)
    run = run_pipeline(pipe, job)
    frames, height, width = run.video.shape[:3]
    report = {"job": asdict(job), "device": device, "dtype": dtype, "random_model": random,
              "video": {"frames": frames, "height": height, "width": width, "fps": job.fps},
              "seconds": {"load": load_s, **run.seconds}, "peak_memory_gib": run.memory or None,
              "coverage": run.coverage.as_dict()}
    if parallel is not None:
        report["parallel"] = parallel.report()
    if is_first():
        return _finish(pipe, job, run, report, out, say)
    if job.compare:
        remove(pipe)
        run_pipeline(pipe, job)
    return report


def _finish(pipe: Any, job: Job, run: Any, report: dict[str, Any], out: Path, say: Any) -> dict[str, Any]:
    """Writes and says what came of a run, and makes its twin."""
    files = {"video": out / "video.mp4"}
    report["seconds"]["mp4"] = timed(pipelines.export_to_video, run.video, files["video"], job.fps)
    say(seconds_line(report["seconds"], job.steps))
    say(memory_line(run.memory, report["device"]))
    say(f"\n{run.coverage}")
    if "parallel" in report:
        say(f"\n{describe(report['parallel'])}")
    if of := world_of(job.model):
        report["adherence"] = judge_video(run.video, job.prompt, of, say)
    _write_report(report, files, out)
    if job.compare:
        remove(pipe)
        report["comparison"] = compare_twin(pipe, job, run.video, out, files, say)
        _write_report(report, files, out)
    say("")
    for name, path in files.items():
        say(f"{name.replace('_', ' ')}: {path}")
    say(f"report: {out / 'report.json'}")
    if report["random_model"]:
        say("The model is random: the video is noise, and only shows that everything runs.")
    return report


def _write_report(report: dict[str, Any], files: dict[str, Path], out: Path) -> None:
    report["files"] = {name: str(path) for name, path in files.items()}
    write_json(out / "report.json", report)


def _random_model(out: Path, wire: Any, say: Any) -> Path:
    folder = out / "random_model"
    say(f"making a small random model in {folder}")
    make_once(folder, lambda folder: pipelines.make_random_pipeline(folder, seed=0), wire)
    return folder


def run(args: argparse.Namespace) -> int:
    """Does the job that the arguments describe."""
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's notes would run through the progress bar; errors still show
    make(job_of(args))
    return 0


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Registers `lowbit-video generate`."""
    parser = subparsers.add_parser("generate", help="make a video, optionally beside its full-precision twin",
                                   description="Make a video of a prompt with low-bit attention.")
    add_arguments(parser)
    parser.set_defaults(run=run)
