"""What does low-bit attention cost the small model, and what does it save, in the types that users run?

    python examples/small_cogvideox/evaluate_precisions.py --dtype bfloat16 --out outputs/precisions
    python examples/small_cogvideox/evaluate_precisions.py --dtype bfloat16 --framework paddle --precisions int8+fp8 \
        --beside outputs/precisions --out outputs/precisions_paddle

Held-out captions, the same start noise for every run of a caption and for both frameworks. The reference is the pipeline with
its framework's own exact attention in the same type; the noise floor is this project's exact kernel against that; every
precision goes in by `apply()`. A finished video is a line in results.jsonl, and the same command goes on where it was stopped
(by `--minutes`, or by force: then what the run at work has made is made again). Run after run, the videos of `--together`
captions are denoised and timed, and then decoded; a decoded video is compared with the exact one on the GPU, and worker
processes do the rest while the others are decoded and the next run gets ready: nothing else is at work while a video is timed.
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
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from makers import DTYPES, MODEL, OTHERS, PaddleMaker, TorchMaker, check_request, hooked, latent_shape, runs_of
from parts import join, otherwise, part
from precision_curve import curve_of, kept_shares, plot_curve
from precision_table import is_exact, markdown, record_of
from sampling import held_out_captions, noise_of
from scoring import Workers, compared, gpu_of, trusted

from lowbit_video.errors import UnsupportedError
from lowbit_video.eval import world
from lowbit_video.eval.compare.candidates import EXACT, FLOOR
from lowbit_video.eval.compare.clips import check_clips
from lowbit_video.eval.compare.paired import check_settings, clip_name
from lowbit_video.eval.compare.settings import Settings, environment
from lowbit_video.eval.compare.store import Store
from lowbit_video.eval.metrics import registry
from lowbit_video.eval.metrics.psnr import psnr
from lowbit_video.eval.metrics.shared.context import Context
from lowbit_video.eval.metrics.shared.device import Device
from lowbit_video.eval.report.write import check_packages, write_report
from lowbit_video.eval.video import as_uint8, read_video
from lowbit_video.files import write_json
from lowbit_video.hook.order import order_tokens
from lowbit_video.pipelines.shared.generation import read_stored
from lowbit_video.pipelines.shared.video_files import BadFramesError
from lowbit_video.token_order import ORDERS

PRECISIONS = ("int8+fp16", "int8+fp8", "int4+fp16", "int4+fp8", "int2+fp16")
METRICS = ("psnr", "ssim", "lpips", "adherence")
CAPTION_SEED = 4000  # the first captions of the 200 that the card's adherence is measured on
WARM_STEPS = 2
TILE_SIDE, FILM_CRF = 256, 20  # a page that a repository can hold


def since(before: dict, now: dict) -> dict:
    """`coverage_note` of what ran between two looks at it, less what had run before."""
    if not now:
        return now
    calls = {name: count - before["attention"].get(name, 0) for name, count in now["attention"].items()}
    return {**now, "attention": {name: count for name, count in calls.items() if count}}


class Evaluation:
    """The videos of one folder of results: which there are, and the making of the others."""

    def __init__(self, args, store: Store, maker, workers: Workers, device: Device | None, generation: dict,
                 metrics: list[str], weights: dict, kinds: dict[str, str], of: str):
        self.args, self.store, self.maker, self.workers, self.device = args, store, maker, workers, device
        self.generation, self.metrics, self.weights, self.kinds, self.of = generation, metrics, weights, kinds, of
        self.pending = []  # (line without its figures, function that gives them)
        self.exact = {}  # exact videos by the caption's number: on the device that compares, or as files for the workers
        self.done = 0

    def make(self, captions: dict[int, str], runs, work: Path, kept: set[str], deadline: float) -> bool:
        """Make what is missing of some captions, by number, run after run.

        Their exact videos are needed whatever is missing. False: time is over."""
        lacking = {run.label: [n for n, caption in captions.items() if not self.store.has(caption, self.args.seed, run.label)]
                   for run in runs}
        needed = sorted({n for numbers in lacking.values() for n in numbers})
        in_time = True
        for run in runs:
            numbers = needed if run.label == EXACT else lacking[run.label]
            if in_time and numbers:
                in_time = self.make_run(run, {n: captions[n] for n in numbers}, set(lacking[run.label]), work, kept, deadline)
        self.finish()
        self.exact.clear()
        for path in work.glob("*-exact.npy"):
            path.unlink()
        return in_time

    def make_run(self, run, captions: dict[int, str], wanted: set[int], work: Path, kept: set[str], deadline: float) -> bool:
        """Videos of one run, decoded when all are denoised; a line for those that are wanted. False: time is over."""
        warm, in_time, denoised = False, True, []
        with hooked(self.maker, run, self.args.backend) as ran, self.maker.compiled(self.args.compile), (
                self.maker.graphed(self.args.cuda_graph)):
            for number, caption in captions.items():
                if not (in_time := time.time() <= deadline):
                    break
                noise = noise_of(1, latent_shape(self.maker), self.args.seed + number)
                line = {"kind": "video", "prompt": caption, "seed": self.args.seed, "run": run.label,
                        "group": self.kinds[caption]}
                try:
                    if not warm:
                        self.maker.make(caption, noise, WARM_STEPS)
                        warm = True
                        self.finish()  # no worker is at work while a video is timed
                    before = ran()
                    latents, seconds = self.maker.make(caption, noise)
                except UnsupportedError as error:
                    if is_exact(run.label):
                        raise
                    self.store.append(line | {"error": str(error)})
                    continue
                line |= {**since(before, ran()), "seconds": round(seconds, 5), "timings": {"denoise": round(seconds, 5)}}
                denoised.append((line, number, latents))
        for line, number, latents in denoised:
            path = work / f"{number}-{run.slug}.npy"
            try:
                video = self.maker.decode(latents)
                job = self.job(line, number, video, path, line["prompt"] in kept)
            except BadFramesError as error:  # NaN is a result, and a bad one
                self.pending.append((line, lambda error=error: {"error": str(error)}))
                continue
            if number in wanted:
                self.pending.append((line, self.workers.start(*job)))
        return in_time

    def job(self, line: dict, number: int, video: np.ndarray, path: Path, clip: bool) -> tuple:
        """What `measured` is to do of a video, which comes to lie at `path`, after the device, if there is one, compared it.

        Raises BadFramesError where the exact video is broken, and where a device finds that this one is."""
        context = Context(line["prompt"], self.weights, world=self.of)
        reference, begun, keep = None, {}, line["run"] == EXACT
        if keep:
            self.exact[number] = self.device.put(video) if self.device else path
        elif number not in self.exact:
            raise BadFramesError("the exact video is broken")
        elif self.device:
            begun = compared(self.device.put(video), self.exact[number], self.metrics, replace(context, device=self.device))
        else:
            reference = self.exact[number]
        np.save(path, as_uint8(video) if self.device else video)
        name = f"clips/{clip_name(self.store, line['prompt'], self.args.seed, line['run'])}.mp4"
        return (path, reference, context, self.metrics, begun, self.store.folder / name if clip else None,
                self.generation["fps"], keep)

    def finish(self) -> None:
        """Wait for the workers, and append the lines of what they measured."""
        for line, answer in self.pending:
            line.update(answer())
            self.store.append(line)
            self.done += 1
            decibels = line.get("figures", {}).get("psnr")
            text = line.get("error") or (f"{decibels:.2f} dB" if decibels is not None else "the reference")
            print(f"{self.done:>4} {line['run']:<26} {line['seconds']:.3f} s  {text}  {line['prompt'][:60]}", flush=True)
        self.pending = []


def first_of_kinds(kinds: dict[str, str], count: int) -> set[str]:
    """The first `count` captions of each kind, of {caption: its kind of background}."""
    groups = {}
    for caption, kind in kinds.items():
        groups.setdefault(kind, []).append(caption)
    return {caption for group in groups.values() for caption in group[:count]}


def beside(folder: Path, other: Path) -> dict:
    """How far the exact videos of two folders are apart, of the captions whose clips both keep: PSNR of each, in dB, and the
    noise floors of the same captions, in both folders.

    Raises:
        ValueError: they keep no clip of the same caption and seed."""
    clips, floors = [], []
    for place in (folder, other):
        lines = Store(place, write=False).videos()
        clips.append({(v["prompt"], v["seed"]): place / v["clip"] for v in lines if v["run"] == EXACT and "clip" in v})
        floors.append({(v["prompt"], v["seed"]): v["figures"]["psnr"] for v in lines if v["run"] == FLOOR and "figures" in v})
    both = [pair for pair in clips[0] if pair in clips[1]]
    if not both:
        raise ValueError(f"{folder} and {other} keep no clip of the same caption; run both with the same --clips")
    decibels = {pair[0]: float(psnr(*(read_video(own[pair]) for own in clips)).mean()) for pair in both}
    known = [pair for pair in both if all(pair in floor for floor in floors)]
    own, theirs = ({pair[0]: floor[pair] for pair in known} for floor in floors)
    return {"folder": other.name, "psnr_db": decibels, "floor_db": own, "floor_there_db": theirs}


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
        write_report(args.out, tile_side=args.tile_side, film_crf=args.film_crf)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
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
    parser.add_argument("--compare-on", choices=("auto", "cpu"), default="auto",
                        help="where PSNR, SSIM and LPIPS are computed: auto: on the GPU if there is one; cpu: by the workers")
    parser.add_argument("--tables", action="store_true", help="make no video: only the tables and the page of --out")
    parser.add_argument("--join", nargs="+", type=Path, metavar="DIR", help="likewise, of --out as these parts together")
    parser.add_argument("--tile-side", type=int, default=TILE_SIDE, help="widest a video is in the page (%(default)s pixels)")
    parser.add_argument("--film-crf", type=int, default=FILM_CRF, metavar="0..51", help="of the page's films: more is smaller "
                        "and worse (%(default)s)")
    parser.add_argument("--no-page", action="store_true", help="no report page, which takes matplotlib and ffmpeg")
    parser.add_argument("--device", help="as the framework names it; default: its GPU if there is one")
    args = parser.parse_args(argv)
    if unclear := [pair for pair in args.weights if "=" not in pair]:
        parser.error(f"--weights {unclear[0]}: write NAME=PATH, such as lpips=FOLDER")
    if args.tile_side < 1:
        parser.error(f"--tile-side {args.tile_side}: at least one pixel is needed")
    if not 0 <= args.film_crf <= 51:
        parser.error(f"--film-crf {args.film_crf}: x264 takes 0 (lossless) to 51")
    if not (args.join or args.tables):
        check_request(parser, args)
    args.device = args.device or ("auto" if args.framework == "paddle" else "cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def check_output(args, fps: float) -> None:
    """Ends the program where clips could not be kept, or the page not be drawn, before any video is made."""
    try:
        if args.clips:
            check_clips(args.out, fps)
    except (ImportError, OSError) as error:
        raise SystemExit(f"no clip can be kept: {error}; --clips 0 keeps none") from error
    try:
        if not args.no_page:
            check_packages()
    except ImportError as error:
        raise SystemExit(f"{error}; --no-page makes the tables alone") from error


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
    check_output(args, generation["fps"])
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
        size = generation["height"], generation["width"]
        device = trusted(gpu_of(maker), metrics, weights, *size) if args.compare_on == "auto" else None
        evaluation = Evaluation(args, store, maker, workers, device, generation, metrics, weights, kinds, of)
        kept = kept_shares(maker, runs, next(iter(kinds)), noise_of(1, latent_shape(maker), args.seed),
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
