"""What does low-bit attention cost the small model, and what does it save, in the types that users run?

    python examples/small_cogvideox/evaluate_precisions.py --dtype bfloat16 --out outputs/precisions
    python examples/small_cogvideox/evaluate_precisions.py --dtype bfloat16 --framework paddle --precisions int8+fp8 \
        --beside outputs/precisions --out outputs/precisions_paddle

Held-out captions, the same start noise for every run of a caption and for both frameworks. The reference is the pipeline with
its framework's own exact attention in the same type; the noise floor is this project's exact kernel against that; every
precision goes in by `apply()`. A finished video is a line in results.jsonl, and the same command goes on where it was stopped
(by `--minutes`, or by force: then what the run at work has made is made again). Run after run, the videos of `--together`
captions are made and timed, and then worker processes measure them: nothing else is at work while a video is timed.
`--compile` compiles the transformer's blocks, anew for each run; `--cuda-graph` launches the transformer, compiled or not, as
one CUDA graph, so that the host's part of a step costs nothing. At the end it writes precisions.json and precisions.md (quality
with intervals, adherence, seconds of denoising, speed-up over the fastest exact attention, and quality by kind of background)
and the report page. Where some keys are pooled (`--precisions "int8+fp8
pooled 0.3 always 64" recipe.toml`), the curve of quality over the share of tiles that is kept stands in precisions.json too,
and is drawn in curve.png. Clips are kept of the first `--clips` captions of each kind of background.

On several GPUs, a process each makes a part of the captions; nothing holds the workers of one off the videos of another:

    CUDA_VISIBLE_DEVICES=0 python examples/small_cogvideox/evaluate_precisions.py --part 1/2 --workers 8 --out outputs/part1
    CUDA_VISIBLE_DEVICES=1 python examples/small_cogvideox/evaluate_precisions.py --part 2/2 --workers 8 --out outputs/part2
    python examples/small_cogvideox/evaluate_precisions.py --join outputs/part1 outputs/part2 --out outputs/precisions
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from makers import DTYPES, OTHERS, PaddleMaker, TorchMaker, hooked, runs_of
from parts import join, otherwise, part
from precision_curve import curve_of, kept_shares, plot_curve
from precision_table import is_exact, markdown, record_of
from sampling import held_out_captions, noise_of

from lowbit_video.errors import UnsupportedError
from lowbit_video.eval import world
from lowbit_video.eval.compare.candidates import EXACT
from lowbit_video.eval.compare.clips import write_lossless
from lowbit_video.eval.compare.paired import check_settings, clip_name, figures
from lowbit_video.eval.compare.settings import Settings, environment
from lowbit_video.eval.compare.store import Store
from lowbit_video.eval.metrics import registry
from lowbit_video.eval.metrics.psnr import psnr
from lowbit_video.eval.metrics.shared.context import Context
from lowbit_video.eval.report.write import write_report
from lowbit_video.eval.video import as_video, read_video
from lowbit_video.files import write_json
from lowbit_video.hook.order import order_tokens
from lowbit_video.kernels.blas_threads import one_blas_thread
from lowbit_video.pipelines.shared.generation import read_stored
from lowbit_video.pipelines.shared.video_files import BadFramesError
from lowbit_video.token_order import ORDERS

PRECISIONS = ("int8+fp16", "int8+fp8", "int4+fp16", "int4+fp8", "int2+fp16")
METRICS = ("psnr", "ssim", "lpips", "adherence")
CAPTION_SEED = 4000  # the first captions of the 200 that the card's adherence is measured on
WARM_STEPS = 2
TILE_SIDE = 256


def measured(video: Path, reference: Path | None, context: Context, metrics: list[str], clip: Path | None, fps: float) -> dict:
    """What is to be recorded of a video that lies in a file: its figures, or why there are none. The file is removed."""
    frames = np.load(video)
    line = {}
    try:
        as_video(frames)
        chosen = [registry.metric(name) for name in metrics]
        with one_blas_thread():
            line = figures(frames, None if reference is None else np.load(reference), chosen, context)
        if clip:
            write_lossless(clip, frames, fps)
            line["clip"] = f"{clip.parent.name}/{clip.name}"
    except BadFramesError as error:  # NaN is a result, and a bad one
        line["error"] = str(error)
    if reference is not None:
        video.unlink()
    return line


def settle() -> None:
    """A worker computes on one core."""
    torch.set_num_threads(1)


class Workers:
    """Processes that measure videos; made before the first use of the GPU, since they are forked."""

    def __init__(self, count: int):
        self.pool = multiprocessing.get_context("fork").Pool(count, settle) if count > 1 else None

    def start(self, *job):
        """A function that gives `measured(*job)`."""
        if self.pool is None:
            return lambda: measured(*job)
        answer = self.pool.apply_async(measured, job)
        return lambda: answer.get(600)

    def close(self) -> None:
        if self.pool:
            self.pool.terminate()


def since(before: dict, now: dict) -> dict:
    """`coverage_note` of what ran between two looks at it, less what had run before."""
    if not now:
        return now
    calls = {name: count - before["attention"].get(name, 0) for name, count in now["attention"].items()}
    return {**now, "attention": {name: count for name, count in calls.items() if count}}


class Evaluation:
    """The videos of one folder of results: which there are, and the making of the others."""

    def __init__(self, args, store: Store, maker, workers: Workers, generation: dict, metrics: list[str], weights: dict,
                 kinds: dict[str, str], of: str):
        self.args, self.store, self.maker, self.workers = args, store, maker, workers
        self.generation, self.metrics, self.weights, self.kinds, self.of = generation, metrics, weights, kinds, of
        self.pending = []  # (line without its figures, the caption's number, the run, whether its clip is kept)
        self.done = 0

    def make(self, captions: dict[int, str], runs, work: Path, kept: set[str], deadline: float) -> bool:
        """Make what is missing of some captions, by number, run after run: nothing measures while videos are made and timed.

        Their exact videos are needed whatever is missing. False: time is over."""
        lacking = {run.label: [n for n, caption in captions.items() if not self.store.has(caption, self.args.seed, run.label)]
                   for run in runs}
        needed = sorted({n for numbers in lacking.values() for n in numbers})
        in_time = True
        for run in runs:
            numbers = needed if run.label == EXACT else lacking[run.label]
            if in_time and numbers:
                in_time = self.make_run(run, {n: captions[n] for n in numbers}, set(lacking[run.label]), work, kept, deadline)
        for path in work.glob("*-exact.npy"):
            path.unlink()
        return in_time

    def make_run(self, run, captions: dict[int, str], wanted: set[int], work: Path, kept: set[str], deadline: float) -> bool:
        """Videos of one run; a line for those that are wanted. False: time is over."""
        warm, in_time = False, True
        with hooked(self.maker, run, self.args.backend) as ran, self.maker.compiled(self.args.compile), (
                self.maker.graphed(self.args.cuda_graph)):
            for number, caption in captions.items():
                if not (in_time := time.time() <= deadline):
                    break
                noise = noise_of(1, self.latent_shape(), self.args.seed + number)
                line = {"kind": "video", "prompt": caption, "seed": self.args.seed, "run": run.label,
                        "group": self.kinds[caption]}
                try:
                    if not warm:
                        self.maker.make(caption, noise, WARM_STEPS)
                        warm = True
                    before = ran()
                    video, seconds = self.maker.make(caption, noise)
                except UnsupportedError as error:
                    if is_exact(run.label):
                        raise
                    self.store.append(line | {"error": str(error)})
                    continue
                np.save(work / f"{number}-{'exact' if run.label == EXACT else run.slug}.npy", video)
                if number in wanted:
                    line |= {**since(before, ran()), "seconds": round(seconds, 5), "timings": {"denoise": round(seconds, 5)}}
                    self.pending.append((line, number, run, caption in kept))
        self.measure(work)
        return in_time

    def measure(self, work: Path) -> None:
        """Have the workers measure what is made, and append its lines."""
        jobs = []
        for line, number, run, kept in self.pending:
            clip = self.store.folder / f"clips/{clip_name(self.store, line['prompt'], self.args.seed, run.label)}.mp4"
            exact = work / f"{number}-exact.npy"
            video, reference = (exact, None) if run.label == EXACT else (work / f"{number}-{run.slug}.npy", exact)
            context = Context(line["prompt"], self.weights, world=self.of)
            jobs.append(self.workers.start(video, reference, context, self.metrics, clip if kept else None,
                                           self.generation["fps"]))
        for (line, *_), answer in zip(self.pending, jobs):
            line.update(answer())
            self.store.append(line)
            self.done += 1
            decibels = line.get("figures", {}).get("psnr")
            text = line.get("error") or (f"{decibels:.2f} dB" if decibels is not None else "the reference")
            print(f"{self.done:>4} {line['run']:<26} {line['seconds']:.3f} s  {text}  {line['prompt'][:60]}", flush=True)
        self.pending = []

    def latent_shape(self) -> tuple[int, int, int, int]:
        asked = self.generation
        return (asked["num_frames"] - 1) // 4 + 1, self.channels(), asked["height"] // 8, asked["width"] // 8

    def channels(self) -> int:
        return self.maker.pipe.transformer.config.in_channels


def first_of_kinds(kinds: dict[str, str], count: int) -> set[str]:
    """The first `count` captions of each kind, of {caption: its kind of background}."""
    groups = {}
    for caption, kind in kinds.items():
        groups.setdefault(kind, []).append(caption)
    return {caption for group in groups.values() for caption in group[:count]}


def beside(folder: Path, other: Path) -> dict:
    """How far the exact videos of two folders are apart, of the captions whose clips both keep: PSNR of each, in dB.

    Raises:
        ValueError: they keep no clip of the same caption and seed."""
    clips = []
    for place in (folder, other):
        lines = Store(place, write=False).videos()
        clips.append({(v["prompt"], v["seed"]): place / v["clip"] for v in lines if v["run"] == EXACT and "clip" in v})
    both = [pair for pair in clips[0] if pair in clips[1]]
    if not both:
        raise ValueError(f"{folder} and {other} keep no clip of the same caption; run both with the same --clips")
    decibels = {pair[0]: float(psnr(*(read_video(own[pair]) for own in clips)).mean()) for pair in both}
    return {"folder": other.name, "psnr_db": decibels}


def write_tables(args) -> None:
    """precisions.json, precisions.md and the page, of what is finished; nothing where no caption is."""
    store = Store(args.out, write=False)
    try:
        record = record_of(store)
    except ValueError as error:
        print(f"no table yet: {error}", flush=True)
        return
    if args.beside:
        record["beside"] = beside(args.out, args.beside)
    if any(share < 1 for share in record["kept"].values()):
        record["curve"] = curve_of(record)
        if not args.no_page:
            plot_curve(args.out / "curve.png", record["curve"], f"{record['captions']} captions, {record['dtype']}, "
                       f"{record['environment']['device']}, commit {record['environment']['commit']}")
    write_json(args.out / "precisions.json", record)
    (args.out / "precisions.md").write_text(markdown(record))
    print(markdown(record), flush=True)
    if not args.no_page:
        write_report(args.out, tile_side=args.tile_side)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--out", type=Path, default=Path("outputs/precisions"), help="the folder of results, gone on with")
    parser.add_argument("--framework", choices=("torch", "paddle"), default="torch")
    parser.add_argument("--dtype", choices=DTYPES, help="of the whole pipeline; default: bfloat16 with PyTorch on a GPU")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), help="also with pooled keys, and recipes")
    parser.add_argument("--order", choices=ORDERS, default="raster", help="of the video's tokens in attention, of all runs")
    parser.add_argument("--other-exact", nargs="*", choices=OTHERS, default=list(OTHERS), help="further exact kernels to run")
    parser.add_argument("--captions", type=int, default=50)
    parser.add_argument("--part", type=part, default=part("1/1"), metavar="I/N", help="only every N-th caption, from the I-th")
    parser.add_argument("--together", type=int, default=25, help="captions of which all runs are made before the next (25)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the transformer's blocks (PyTorch only)")
    parser.add_argument("--cuda-graph", action="store_true", help="the transformer as one CUDA graph (PyTorch on a GPU)")
    parser.add_argument("--seed", type=int, default=CAPTION_SEED, help="of the captions and of the noise")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--backend", default="auto", help="of the precisions: auto, reference, triton or hopper")
    parser.add_argument("--clips", type=int, default=1, help="captions of each kind of background whose clips are kept")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=PATH", help="of a metric: lpips=FOLDER")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="another folder of results: how far its exact videos are")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no video after so long; the same command goes on")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 3),
                        help="processes that measure; with several parts at work, say how many each has (%(default)s)")
    parser.add_argument("--tables", action="store_true", help="make no video: only the tables and the page of --out")
    parser.add_argument("--join", nargs="+", type=Path, metavar="DIR", help="likewise, of --out as these parts together")
    parser.add_argument("--tile-side", type=int, default=TILE_SIDE, help="widest a video is in the page (%(default)s pixels)")
    parser.add_argument("--no-page", action="store_true", help="no report page, which takes matplotlib and ffmpeg")
    parser.add_argument("--device", help="as the framework names it; default: its GPU if there is one")
    args = parser.parse_args(argv)
    if unclear := [pair for pair in args.weights if "=" not in pair]:
        parser.error(f"--weights {unclear[0]}: write NAME=PATH, such as lpips=FOLDER")
    args.device = args.device or ("auto" if args.framework == "paddle" else "cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    if args.join:
        join(args.join, args.out)
    if args.join or args.tables:
        write_tables(args)
        return 0
    deadline = time.time() + 60 * args.minutes
    weights = dict(pair.split("=", 1) for pair in args.weights)
    lacking = {name: reason for name in METRICS if (reason := registry.metric(name).missing(weights))}
    metrics = [name for name in METRICS if name not in lacking]
    generation = read_stored(args.model)
    generation["num_inference_steps"] = args.steps or generation["num_inference_steps"]
    of = generation.get("world", world.SMALL.name)
    kinds = {caption: world.parse(caption, world.WORLDS[of]).texture
             for caption in held_out_captions(args.captions, args.seed, of)}
    workers = Workers(args.workers)
    maker = (TorchMaker if args.framework == "torch" else PaddleMaker)(args.model, args.dtype, args.device, generation)
    order_tokens(maker.pipe, args.order)
    runs, absent = runs_of(maker, args.precisions, args.other_exact)
    settings = Settings(args.model, generation["num_inference_steps"], generation["guidance_scale"], generation["num_frames"],
                        generation["height"], generation["width"], generation["fps"])
    store, work = Store(args.out), Path(tempfile.mkdtemp(prefix="precisions"))
    try:
        check_settings(store, settings)
        about = {"framework": args.framework, "dtype": args.dtype, "backend": args.backend, "reference": maker.reference,
                 "compiled": args.compile, "order": args.order, "cuda_graph": args.cuda_graph}
        for known in store.runs()[:1]:
            if differ := otherwise(known, about):
                raise ValueError(f"{args.out} was begun with {', '.join(differ)}; give another --out")
        evaluation = Evaluation(args, store, maker, workers, generation, metrics, weights, kinds, of)
        kept = kept_shares(maker, runs, next(iter(kinds)), noise_of(1, evaluation.latent_shape(), args.seed),
                           generation["num_inference_steps"])
        store.append({"kind": "run", "settings": settings.as_dict(), "prompts": list(kinds), "seeds": [args.seed],
                      "runs": [run.label for run in runs], "metrics": metrics, "missing": {**lacking, **absent}, **about,
                      "kept": kept,
                      "floor": f"this project's own exact kernel, against {maker.reference}", "generation": generation,
                      "environment": {**environment(), "device": maker.device_name},
                      "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
        clips = first_of_kinds(kinds, args.clips)
        first, step = args.part
        numbered = list(enumerate(kinds))[first::step]
        pieces = [dict(numbered[at:at + args.together]) for at in range(0, len(numbered), args.together)]
        finished = all([evaluation.make(piece, runs, work, clips, deadline) for piece in pieces])
    finally:
        workers.close()
        store.close()
        shutil.rmtree(work, ignore_errors=True)
    if not finished:
        print("time is over before all videos are made: the same command goes on", flush=True)
    write_tables(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
