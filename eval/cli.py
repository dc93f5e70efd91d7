"""`lowbit-video eval`: compare, layers, report. Imports no framework until a command runs."""
from __future__ import annotations

import argparse
from pathlib import Path

from lowbit_video.token_order import ORDERS

DEFAULT_OUT = "outputs/eval"
DEFAULT_PRECISIONS = "int8+fp16,int8+fp8,int4+fp16,int2+fp16"


COMPARE = ("Make every video once, exact and at each precision, measure them in pairs and write the report. A second start "
           "goes on where the first one was stopped.")
LAYERS = ("Run one prompt; at every attention call compare each candidate with exact attention on the same q, k, v, and "
          "measure what reaches the final latent.")
REPORT = "Write report.html (self-contained), report.md and report.png from a folder of results."


def add_parsers(subparsers) -> None:
    """Register the commands below `eval`."""
    parser = subparsers.add_parser("compare", description=COMPARE,
                                   help="videos at low bit beside exact ones, with a noise floor and intervals")
    add_model(parser)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line; # begins a comment")
    parser.add_argument("--seeds", type=numbers, default=[0], metavar="0,1", help="one video per prompt and seed; default 0")
    add_candidates(parser)
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts: a quick look")
    parser.add_argument("--metrics", type=names, metavar="A,B", help="default: all that can run here")
    parser.add_argument("--weights", action="append", default=[], type=named_path, metavar="NAME=PATH",
                        help="local weights of a model-based metric: lpips, clip, vqa, fvd")
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), metavar="DIR", help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--no-report", action="store_true", help="results only")
    add_report(parser)
    parser.set_defaults(run=run_compare)

    parser = subparsers.add_parser("layers", description=LAYERS, help="where the error comes from: layer, step and head")
    add_model(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int, default=0)
    add_candidates(parser)
    parser.add_argument("--local-shares", action="store_true",
                        help="skip the runs that measure what each layer and group of steps leaves in the final latent")
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT) / "layers.npz", metavar="FILE",
                        help=f"default: {DEFAULT_OUT}/layers.npz, where `report` finds it")
    parser.set_defaults(run=run_layers)

    parser = subparsers.add_parser("report", description=REPORT, help="HTML, Markdown and PNG from results")
    parser.add_argument("results", type=Path, nargs="?", default=Path(DEFAULT_OUT), help=f"default: {DEFAULT_OUT}")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to write; default: the results' folder")
    parser.add_argument("--layers", type=Path, metavar="FILE", help="a layer table; default: layers.npz among the results")
    add_report(parser)
    parser.set_defaults(run=run_report)

    parser = subparsers.add_parser("metrics", help="the metrics there are, and what they lack here")
    parser.add_argument("--weights", action="append", default=[], type=named_path, metavar="NAME=PATH")
    parser.set_defaults(run=run_metrics)


def add_model(parser) -> None:
    """The pipeline and what is asked of it."""
    parser.add_argument("--model", metavar="DIR",
                        help="diffusers folder or Hugging Face Hub id (default: the small trained model of the checkout)")
    parser.add_argument("--device", default="auto", help="as Paddle names it: cpu, gpu:0; default: auto")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32, float16, bfloat16")
    numbers_of_a_video = (("steps", int, "denoising steps"), ("guidance", float, "guidance scale"), ("frames", int, "frames"),
                          ("height", int, "pixels"), ("width", int, "pixels"), ("fps", float, "frames a second of clips"))
    for name, kind, text in numbers_of_a_video:
        parser.add_argument(f"--{name}", type=kind, help=f"{text}; default: the model's generation.json, else the pipeline's")


def add_candidates(parser) -> None:
    """What to compare, and how it is hooked."""
    parser.add_argument("--precisions", type=names, default=names(DEFAULT_PRECISIONS), metavar="A,B",
                        help="precisions, recipes (files that end in .toml, or safe or fast), or processors as "
                        f"module:Class; default: {DEFAULT_PRECISIONS}")
    parser.add_argument("--order", choices=ORDERS, default="raster", help="of the video's tokens in attention, of all runs; a "
                        "recipe's is the one that it was calibrated with; default: raster")
    parser.add_argument("--backend", default="auto", help="auto, reference, triton or hopper")
    parser.add_argument("--fallback", choices=["exact"], help="exact attention where no kernel serves; default: an error")


def add_report(parser) -> None:
    """What the report shows beside the results."""
    parser.add_argument("--speed", type=Path, metavar="FILE", help="JSON of `lowbit-video bench`, for its speed-ups")
    parser.add_argument("--speed-shape", metavar="NAME", help="the benchmark's shape; default: the one with the most tokens")
    parser.add_argument("--no-films", action="store_true", help="a small page without videos")


def names(text: str) -> list[str]:
    """A comma-separated list."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("an empty list")
    return found


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers."""
    try:
        return [int(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1") from None


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def named_path(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def load(args):
    """(pipeline, settings) of the arguments."""
    from lowbit_video.pipelines import load as load_pipeline

    settings = settings_of(args)
    return load_pipeline(args.model, dtype=args.dtype, device=args.device), settings


def put_in_order(pipe, args) -> None:
    """Gives the model its tokens in the order that is asked for."""
    from lowbit_video.hook.order import order_tokens

    if args.order != "raster":  # which every model has, also one that takes no other
        order_tokens(pipe, args.order)


def settings_of(args):
    """What is asked of the pipeline for every video."""
    from .compare.settings import for_model

    return for_model(args.model, steps=args.steps, guidance=args.guidance, frames=args.frames, height=args.height,
                     width=args.width, fps=args.fps)


def run_compare(args) -> int:
    """`eval compare`."""
    from lowbit_video.pipelines.shared.small_model import model_or_small

    from .compare.candidates import as_candidate
    from .compare.paired import compare, read_prompts
    from .metrics.registry import choose
    from .report.write import check_packages

    if not args.no_report:
        check_packages()
    prompts, candidates = read_prompts(args.prompts), [as_candidate(name) for name in args.precisions]
    args.model = model_or_small(args.model)
    choose(args.metrics, dict(args.weights))  # mistakes first, the model afterwards
    pipe, settings = load(args)
    put_in_order(pipe, args)
    try:
        compare(pipe, prompts, candidates, args.out, seeds=args.seeds, settings=settings, metrics=args.metrics,
                weights=dict(args.weights), limit=args.limit, backend=args.backend, fallback=args.fallback, say=say)
    except KeyboardInterrupt:
        say(f"stopped; what is finished is in {args.out}, and the same command goes on from there")
        raise
    if not args.no_report:
        report(args.out, args)
    return 0


def run_layers(args) -> int:
    """`eval layers`."""
    from lowbit_video.pipelines.shared.small_model import model_or_small
    from lowbit_video.pipelines.shared.video_files import check_writable

    from .compare.candidates import as_candidate
    from .compare.layer_table import as_text
    from .compare.layers import measure_layers

    candidates = [as_candidate(name) for name in args.precisions]
    args.model = model_or_small(args.model)
    check_writable(args.out)
    pipe, settings = load(args)
    put_in_order(pipe, args)
    table = measure_layers(pipe, args.prompt, candidates, seed=args.seed, settings=settings,
                           measured_shares=not args.local_shares, backend=args.backend, fallback=args.fallback, say=say)
    table.save(args.out)
    print(as_text(table))
    say(f"{args.out}")
    return 0


def run_report(args) -> int:
    """`eval report`."""
    report(args.results, args, out=args.to, layers=args.layers)
    return 0


def run_metrics(args) -> int:
    """`eval metrics`."""
    from .metrics.registry import metrics

    for metric in metrics().values():
        lacking = metric.missing(dict(args.weights))
        print(f"{metric.name:<18} {metric.kind:<7} {metric.unit or '-':<16} {metric.direction:<17} {lacking or 'ready'}")
    return 0


def report(folder, args, **places) -> None:
    """Write the report and say where it is."""
    from .report.write import write_report

    write_report(folder, speed=args.speed, speed_shape=args.speed_shape, films=not args.no_films, say=say, **places)


def say(text: str) -> None:
    """A line of progress, seen at once even through a pipe."""
    print(text, flush=True)
