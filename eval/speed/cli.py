"""`lowbit-video bench ...`: attention kernels, a whole step, a whole video, several GPUs, and tiles for this GPU."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.precision import EXACT_SPECS, PRESETS


def add_parsers(subparsers) -> None:
    """Registers `kernels`, `tune`, `parallel`, `step` and `video`."""
    kernels = subparsers.add_parser(
        "kernels", help="time every attention kernel on this GPU beside exact attention",
        description="Times every attention kernel on this GPU beside FlashAttention-2, cuDNN, exact attention, and "
                    "FlashAttention-4 and SageAttention where they are installed (PyPI: flash-attn-4, sageattention), each "
                    "checked against float32 first. Totals count quantisation.")
    _common(kernels)
    kernels.add_argument("--variants", nargs="+", metavar="NAME",
                         help="precisions (int8+fp8), variants (triton-int-fp8) or backends (triton, hopper); default: all")
    _recipe(kernels, "time")
    kernels.add_argument("--quick", action="store_true", help="three shapes and int8+fp16, int8+fp8 only")
    kernels.add_argument("--no-baselines", action="store_true", help="leave the other libraries' attention out")
    kernels.add_argument("--budget-ms", type=float, default=400.0, metavar="MS",
                         help="device time for the slowest method's runs on one shape; all run equally often (default: 400)")
    kernels.add_argument("--totals-only", action="store_true", help="do not time the kernel and quantisation apart")
    kernels.add_argument("--jobs", type=int, default=0, metavar="N",
                         help="compile the kernels in N processes first (default: 0, as they are met)")
    kernels.add_argument("--out", type=Path, default=Path("outputs/bench"), metavar="FOLDER", help="default: outputs/bench")
    kernels.add_argument("--name", default="kernels", metavar="STEM", help="name of the files written (default: kernels)")
    kernels.set_defaults(run=run_kernels)

    tune = subparsers.add_parser(
        "tune", help="measure tile shapes and shortest useful lengths for this GPU, and write them as data",
        description="Times the portable kernel over tile shapes, warps and stages, and finds from how many tokens on each "
                    "precision beats exact attention. Writes a JSON file that LOWBIT_VIDEO_TUNING names to use it.")
    _common(tune, ("float16", "bfloat16", "float32"))
    tune.add_argument("--variants", nargs="+", metavar="PRECISION",
                      help="precisions to tune; default: one per family (float32: exact)")
    _recipe(tune, "tune")
    tune.add_argument("--jobs", type=int, default=0, metavar="N", help="compile the candidates in N processes first")
    only = tune.add_mutually_exclusive_group()
    only.add_argument("--no-lengths", action="store_true", help="leave the shortest useful lengths out")
    only.add_argument("--lengths-only", action="store_true", help="leave the tiles out")
    tune.add_argument("--out", type=Path, default=Path("outputs/tuning.json"), metavar="FILE",
                      help="default: outputs/tuning.json")
    tune.set_defaults(run=run_tune)


    parallel = subparsers.add_parser(
        "parallel", help="time attention, a whole step and decoding on several GPUs beside one",
        description="Starts a process for each GPU and times attention of a layer with its exchange, a whole step by every "
                    "split, and the VAE's decode, each beside one GPU in the same turns, with the bytes sent and how equal the "
                    "results are.")
    parallel.add_argument("--gpus", type=int, default=2, metavar="N", help="default: 2")
    from .parallel.arguments import add_arguments

    add_arguments(parallel)
    parallel.set_defaults(run=run_parallel)


    step = subparsers.add_parser(
        "step", help="time a whole denoising step of a model by each attention, eager and compiled",
        description="Times one denoising step of diffusers' video models at full size, random weights, with PyTorch's "
                    "attention, FlashAttention-2, cuDNN, FlashAttention-4 and SageAttention where they are installed, ours, "
                    "and no attention at all, each checked first; and of this project's CogVideoX in Paddle.")
    from .step.run import add_arguments as add_step_arguments

    add_step_arguments(step)
    step.set_defaults(run=run_step)


    video = subparsers.add_parser(
        "video", help="time a whole video of CogVideoX by stage, exact beside low bit",
        description="Makes whole videos with this project's Paddle pipeline at full size, random weights of every part: "
                    "seconds of text encoding, denoising and decoding, and the most memory of each, by precision.")
    from .video.run import add_arguments as add_video_arguments

    add_video_arguments(video)
    video.set_defaults(run=run_video)


def _common(parser: argparse.ArgumentParser, dtypes: tuple[str, ...] = ("float16", "bfloat16")) -> None:
    parser.add_argument("--shapes", metavar="LIST",
                        help='";"-separated groups (models, anchors, sweep), model names or B,H,N,D[,causal]')
    parser.add_argument("--framework", choices=("auto", "paddle", "torch"), default="auto",
                        help="whose tensors to use (default: auto, the first of torch and paddle that has a GPU)")
    parser.add_argument("--dtype", choices=dtypes, default="float16")


def _recipe(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--recipe", metavar="FILE", help=f"{what} the precisions of a recipe's rungs in place of those: its "
                        f"file, or {' or '.join(PRESETS)} (docs/recipes.md)")


def specs_of(args: argparse.Namespace, specs_of_recipe: Callable[..., tuple[str, ...]]) -> tuple[str, ...] | None:
    """The precisions of --recipe; None without one. specs_of_recipe: takes a recipe and what prints.

    Raises ValueError where --variants names precisions too, and for a recipe that cannot be read.
    """
    if args.recipe is None:
        return None
    recipe = Recipe.load(args.recipe)
    if named := [text for text in args.variants or () if "+" in text or text in EXACT_SPECS]:
        raise ValueError(f"--recipe {args.recipe} and --variants {' '.join(named)} both name precisions; give one of them")
    return specs_of_recipe(recipe, say)


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)


def pick_framework(name: str) -> str:
    """The framework to run on; ValueError where it, or with "auto" any, has no NVIDIA GPU."""
    import importlib.util

    from lowbit_video.runtime import detect

    candidates = ("torch", "paddle") if name == "auto" else (name,)
    for candidate in candidates:
        if importlib.util.find_spec(candidate) is None:
            continue
        like = detect.anchor(candidate)
        if not detect.runtime_of(like).is_cpu(like):
            return candidate
    raise ValueError(f"this needs an NVIDIA GPU, and {' and '.join(candidates)} found none: on a machine with one install "
                     "paddlepaddle-gpu (or torch with CUDA); `lowbit-video doctor` says what this machine has")


def run_kernels(args: argparse.Namespace) -> int:
    from lowbit_video.pipelines.shared.video_files import check_writable

    from . import bench, shapes

    chosen_shapes = shapes.parse_shapes(args.shapes, args.quick)
    specs = specs_of(args, bench.specs_of)
    check_writable(args.out / f"{args.name}.json")
    framework = pick_framework(args.framework)
    if specs is None:
        specs = bench.QUICK_SPECS if args.quick and not args.variants else bench.specs_for(args.variants)
    wanted = bench.chosen(args.variants)
    if args.jobs:
        print(f"compiled in {bench.precompile(chosen_shapes, framework, args.dtype, specs, args.jobs):.0f} s", flush=True)
    rows = []
    for shape in chosen_shapes:
        print(f"{shape} {shape.name}", flush=True)
        rows += bench.bench_shape(shape, framework=framework, dtype=args.dtype, specs=specs, wanted=wanted,
                                  with_baselines=not args.no_baselines, budget_ms=args.budget_ms, totals_only=args.totals_only,
                                  log=say)
        about = bench.environment(framework)
        bench.save(rows, about, args.out, args.name, plots=False)  # what is measured so far outlives an interruption
    print(bench.markdown(rows, about))
    print("written:", *bench.save(rows, about, args.out, args.name))
    return 1 if any(row.error for row in rows) else 0


def run_parallel(args: argparse.Namespace) -> int:
    from .parallel.launch import launch

    return launch(args)


def run_step(args: argparse.Namespace) -> int:
    from .step.run import run

    return run(args)


def run_video(args: argparse.Namespace) -> int:
    from .video.run import run

    return run(args)


def run_tune(args: argparse.Namespace) -> int:
    from lowbit_video.pipelines.shared.video_files import check_writable

    from . import shapes, tune

    chosen_shapes = shapes.parse_shapes(args.shapes or "2,30,17776,64;1,24,32768,128")
    specs = specs_of(args, tune.specs_of) or args.variants
    check_writable(args.out)
    framework = pick_framework(args.framework)
    path = tune.tune(chosen_shapes, framework=framework, dtype=args.dtype, specs=specs, out=args.out, jobs=args.jobs,
                     lengths=not args.no_lengths, tiles=not args.lengths_only, log=say)
    print(f"written: {path}; use it with LOWBIT_VIDEO_TUNING={path}")
    return 0
