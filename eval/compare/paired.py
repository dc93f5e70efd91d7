"""Pairs done right: every candidate's video beside the exact one of the same prompt and noise, and the noise floor beside both.

For each prompt and seed: the exact run, its harmlessly different twin (the floor), then each candidate. A finished video is
a line in results.jsonl and a lossless clip; whatever is finished is never made again, and a kill loses at most the video
in the making. Only the exact video is needed again (as the reference) when a later start adds candidates to a prompt.
"""
from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lowbit_video.files import write_whole
from lowbit_video.hook.order import order_of
from lowbit_video.hook.report import coverage
from lowbit_video.pipelines.shared.video_files import BadFramesError

from ..metrics import registry
from ..metrics.shared.context import Context
from ..video import as_video
from ..world.folder import world_of
from ..world.scene import SMALL
from .candidates import EXACT, FLOOR, Candidate, applied, as_candidate, floor_candidate
from .clips import check_clips, write_lossless
from .progress import Progress
from .settings import Settings, environment
from .store import Store

SAME = ("steps", "guidance", "frames", "height", "width")  # settings that all videos of a folder must share
PROMPTS = Path(__file__).parents[1] / "prompts"
"""The files of prompts of a checkout."""


def come_with() -> str:
    """The files of prompts that this checkout has, for a message; an installed package has none."""
    here = Path.cwd()
    found = [path.relative_to(here) if path.is_relative_to(here) else path for path in sorted(PROMPTS.glob("*.txt"))]
    return f", such as {' or '.join(map(str, found))}" if found else ""


def read_prompts(path) -> list[str]:
    """Prompts of a text file, one a line; blank lines and lines that begin with # are left out.

    Raises:
        FileNotFoundError: no such file (names those of this checkout). ValueError: a folder, not UTF-8, no prompt in it, or
            one twice (named).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the first prompt
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no such file: {path}; give a text of one prompt a line{come_with()}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a text of one prompt a line{come_with()}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    prompts = [line.strip() for line in text.splitlines()]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it; write one a line")
    if twice := sorted({p for p in prompts if prompts.count(p) > 1}):
        raise ValueError(f"{path}: {twice[0]!r} stands there more than once; a prompt's runs are told apart by its text")
    return prompts


def generate(pipe, prompt: str, seed: int, settings: Settings, candidate: Candidate | None = None,
             on_step: Callable | None = None, **hook) -> tuple[np.ndarray, dict]:
    """One video: float32 [F, H, W, 3] in [0, 1], and what is to be recorded of its making.

    Args:
        candidate: hooked in for this call only; None runs the pipeline as it is, exact.
        on_step: the pipeline's `callback_on_step_end`.
        hook: `backend`, `fallback` of the hook.
    """
    begin = time.perf_counter()
    arguments = {"seed": seed, "output_type": "np", "progress": False, "callback_on_step_end": on_step,
                 **settings.arguments()}
    note = {}
    if candidate is None:
        output = pipe(prompt, **arguments)
    else:
        with applied(pipe, candidate, **hook):
            output = pipe(prompt, **arguments)
            note = coverage_note(pipe)
    note["seconds"] = round(time.perf_counter() - begin, 3)
    if timings := getattr(output, "timings", None):
        note["timings"] = {stage: round(seconds, 3) for stage, seconds in timings.items()}
    return np.asarray(output.frames[0]), note


def coverage_note(pipe) -> dict:
    """What the hooked attention modules ran: {"attention": {variant: calls}, "fallbacks": modules}."""
    report = coverage(pipe)
    return {"attention": report.variants(), "fallbacks": len(report.fallbacks)}


def figures(video, reference, metrics: Sequence[registry.Metric], context: Context) -> dict:
    """Every figure of one video: {"figures": {name: value}, "frames": {name: [..]}, "features": {name: [..]}}.

    reference: the exact video, or None for the exact video itself (its paired metrics are left out).
    """
    values, frames, features = {}, {}, {}
    for metric in metrics:
        if metric.kind == "paired" and reference is None:
            continue
        if metric.kind == "set":
            features[metric.name] = [float(x) for x in metric.module.features(video, context)]
        elif hasattr(metric.module, "per_frame"):
            rows = metric.module.per_frame(video, reference, context)
            frames[metric.name] = [round(float(x), 5) for x in rows]
            values[metric.name] = float(rows.mean())
        else:
            value = metric.module.measure(video, reference, context)
            if isinstance(value, Mapping):
                values.update({f"{metric.name}.{part}": float(x) for part, x in value.items()})
            elif value is not None:
                values[metric.name] = float(value)
    return {"figures": values, "frames": frames, "features": features}


def compare(pipe, prompts: Sequence[str], candidates: Sequence, out, *, seeds: Sequence[int] = (0,),
            settings: Settings | None = None, metrics: Sequence[str] | None = None, weights: Mapping[str, str] | None = None,
            limit: int | None = None, backend: str = "auto", fallback: str | None = None,
            say: Callable[[str], None] = print) -> Path:
    """Make and measure every video that the folder `out` does not have yet.

    Args:
        pipe: called as pipe(prompt, seed=..., output_type="np", callback_on_step_end=..., ...) -> .frames; hooked by
            `lowbit_video.apply`. All videos of a folder have the tokens in its order.
        prompts: captions; see `read_prompts`.
        candidates: precisions, "module:Class" names, or `Candidate`s.
        out: the folder of results.
        seeds: one video per prompt and seed; a pair shares its seed, hence its noise.
        settings: steps, guidance, size; a folder's videos all share them.
        metrics: names, or None for all that can run here. weights: local weights of the model-based ones.
        limit: look at the first `limit` prompts only.
        backend, fallback: of the low-bit hook.
        say: takes each line of progress.

    Returns:
        The path of results.jsonl.

    Raises:
        ValueError: no prompts, seeds or candidates; an unknown one; settings or an order of tokens other than those the
            folder was begun with.
    """
    settings = settings or Settings()
    candidates = [as_candidate(c) for c in candidates]
    prompts = list(prompts)[:limit]
    for name, given in (("prompts", prompts), ("seeds", seeds), ("candidates", candidates)):
        if not given:
            raise ValueError(f"no {name} given; an evaluation needs at least one")
    if len({c.label for c in candidates}) < len(candidates):
        raise ValueError(f"a candidate is named twice: {', '.join(c.label for c in candidates)}")
    weights = dict(weights or {})
    chosen, lacking = registry.choose(metrics, weights)
    if lacking:
        say(f"not run here: {', '.join(lacking)} (`lowbit-video eval metrics` says what they need)")
    store = Store(out)
    try:
        check_settings(store, settings)
        labels = [EXACT, FLOOR, *[c.label for c in candidates]]
        plan = [(p, s, r) for p in prompts for s in seeds for r in labels]
        todo = [key for key in plan if not store.has(*key)]
        if len(plan) > len(todo):
            say(f"{len(plan) - len(todo)} of {len(plan)} videos are finished already; {len(todo)} to make")
        unfinished = {(p, s) for p, s, _ in todo}
        for prompt, seed in {(p, s) for p, s, _ in plan} - unfinished:  # of a run that stopped behind its last video
            reference_path(store, prompt, seed).unlink(missing_ok=True)
        if not todo:
            return store.path
        check_clips(store.folder, settings.fps)
        order = order_of(pipe)
        for run in store.runs()[:1]:
            if (begun := run.get("order", "raster")) != order:
                raise ValueError(f"{store.folder} was begun with the tokens in the order {begun!r}, not {order!r}; give "
                                 "another --out")
        store.append({"kind": "run", "settings": settings.as_dict(), "prompts": prompts, "seeds": list(seeds), "runs": labels,
                      "metrics": [m.name for m in chosen], "missing": lacking, "backend": backend, "order": order,
                      "environment": environment(), "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
        _run(pipe, store, todo, candidates, settings, chosen, weights, {"backend": backend, "fallback": fallback}, say)
    finally:
        store.close()
    return store.path


def check_settings(store: Store, settings: Settings) -> None:
    """Refuse to mix videos that were made otherwise.

    Raises:
        ValueError: names each setting that differs.
    """
    for run in store.runs()[:1]:
        if differ := differing(run, settings):
            raise ValueError(f"{store.folder} was begun with other settings ({'; '.join(differ)}); give another --out")


def differing(run: dict, settings: Settings) -> list[str]:
    """What of the settings that all videos of a folder share a line of it has otherwise: "steps 8 -> 50" and the like."""
    known = run["settings"]
    differ = [f"{name} {known.get(name)} -> {getattr(settings, name)}" for name in SAME
              if known.get(name) != getattr(settings, name)]
    if Path(known["model"]).name != Path(settings.model).name:
        differ.append(f"model {known['model']} -> {settings.model}")
    return differ


def _run(pipe, store, todo, candidates, settings, metrics, weights, hook, say) -> None:
    progress = Progress([run for _, _, run in todo], say)
    models: dict = {}
    of = world_of(settings.model) or SMALL.name
    width = max(len(run) for _, _, run in todo)
    made = {FLOOR: floor_candidate(), **{c.label: c for c in candidates}}
    for prompt, seed in dict.fromkeys((p, s) for p, s, _ in todo):
        runs = [r for p, s, r in todo if (p, s) == (prompt, seed)]
        progress.begin(runs[0])
        reference = _reference(pipe, store, prompt, seed, settings, runs, progress)
        for run in runs:
            progress.begin(run)
            begin = time.perf_counter()
            line = {"kind": "video", "prompt": prompt, "seed": seed, "run": run}
            context = Context(prompt, weights, {}, models, of)
            try:
                video, note = (reference.video, reference.note) if run == EXACT else generate(
                    pipe, prompt, seed, settings, made[run], progress.step, **(hook if run != FLOOR else {}))
                line.update(note)
                as_video(video)
                line.update(figures(video, None if run == EXACT else reference.video, metrics, context))
                line["clip"] = _keep(store, prompt, seed, run, video, settings.fps)
            except BadFramesError as error:  # a candidate that gives NaN is a result, and a bad one
                if run in (EXACT, FLOOR):
                    raise
                line["error"] = str(error)
            store.append(line)
            spent = time.perf_counter() - begin + (line["seconds"] if run == EXACT else 0)
            progress.done(run, spent, f"{run:<{width}}  seed {seed}  {headline(line):<25}  {prompt[:48]}")
        reference.path.unlink(missing_ok=True)


class _Reference:
    """The exact video of the prompt in work, on disk as float32 until its last candidate is finished."""

    def __init__(self, path: Path, video: np.ndarray, note: dict) -> None:
        self.path, self.video, self.note = path, video, note


def reference_path(store: Store, prompt: str, seed: int) -> Path:
    """Where the exact video of a prompt is kept while it is in work."""
    return store.folder / "work" / f"{clip_name(store, prompt, seed, EXACT)}.npy"


def _reference(pipe, store: Store, prompt: str, seed: int, settings: Settings, runs: list[str],
               progress: Progress) -> _Reference:
    path = reference_path(store, prompt, seed)
    if EXACT not in runs and path.is_file():
        return _Reference(path, np.load(path), {})
    if EXACT not in runs:
        progress.say(f"making the exact video again, as the reference of what is left: {prompt[:60]}")
    video, note = generate(pipe, prompt, seed, settings, on_step=progress.step if EXACT in runs else None)
    video = np.asarray(video, np.float32)
    path.parent.mkdir(exist_ok=True)
    with write_whole(path) as part:
        np.save(part, video)
    return _Reference(path, video, note)


def clip_name(store: Store, prompt: str, seed: int, run: str) -> str:
    """A file name for one video: position of the prompt among all seen, seed, run."""
    key = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{key}-s{seed}-{Candidate(run, dict).slug}"


def _keep(store: Store, prompt: str, seed: int, run: str, video: np.ndarray, fps: float) -> str:
    name = f"clips/{clip_name(store, prompt, seed, run)}.mp4"
    write_lossless(store.folder / name, video, fps)
    return name


def headline(line: dict) -> str:
    """The figures shown while it runs: those that are kept by frame."""
    if "error" in line:
        return f"FAILED: {line['error']}"
    shown = sorted(map(registry.metric, line["frames"]), key=lambda metric: metric.place)
    return "  ".join(f"{m.name} {line['figures'][m.name]:.{m.digits}f} {m.unit}".rstrip() for m in shown)
