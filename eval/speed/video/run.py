"""`bench video`: whole videos of one model, text to pixels, by each precision; seconds and most memory by stage."""
from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit_video.files import write_json, write_whole
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.rung import as_rung

from ..cogvideox import CONFIGS

PROMPT = "a red ball"
WARM_STEPS = 2
"""Denoising steps of a first video that does not count: kernels are compiled, and memory is taken from the device."""
STAGES = {"text_encode": "text", "denoise": "denoising", "decode": "decoding"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument("--model", choices=tuple(CONFIGS), default="2b", help="CogVideoX's size (default: 2b)")
    parser.add_argument("--precisions", nargs="+", metavar="NAME", default=["exact", "int8+fp8"],
                        help="of attention, one video each; the others are compared with the first (default: exact int8+fp8)")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="FILE", help="also by these recipes, one video each: a "
                        "recipe's file, or safe or fast")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (default: 50)")
    for name, what in (("frames", "frames"), ("height", "pixels"), ("width", "pixels")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: the model's own)")
    parser.add_argument("--low-memory", action="store_true", help="text encoder and transformer on the device one at a time; "
                        "their random weights are made each time, which is told apart")
    parser.add_argument("--tiles", action="store_true", help="decode by tiles")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU where there is no GPU: a dry run")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), metavar="FOLDER", help="default: outputs/bench")
    parser.add_argument("--name", default="video", metavar="STEM", help="name of the files written (default: video)")


def run(args: argparse.Namespace) -> int:
    """Makes the videos, prints and writes STEM.json and STEM.md after each; 1 where one failed.

    Raises ValueError for a precision or a number of steps that does not exist, a recipe that cannot be read, and without a GPU
    unless the model is tiny.
    """
    if importlib.util.find_spec("paddle") is None:
        raise ValueError("`bench video` times this project's pipeline, which needs PaddlePaddle; see README.md")
    for name in args.precisions:
        as_rung(name)
    for name in args.recipe:
        Recipe.load(name)
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; give 1 or more")
    from lowbit_video.pipelines.shared.video_files import check_writable

    file = args.out / f"{args.name}.json"
    check_writable(file)
    from lowbit_video.runtime import paddle_runtime

    device = paddle_runtime.default_device()
    if device == "cpu" and not args.tiny:
        raise ValueError("this needs an NVIDIA GPU, and Paddle has none here; --tiny is a dry run without one")

    def save(result: dict[str, Any]) -> None:
        write_json(file, result)
        with write_whole(file.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")

    result = measure(args, device, lambda text: print(text, flush=True), save)
    print(markdown(result))
    print(f"written: {file} and beside it")
    return int(any("failed" in one for one in result["videos"]))


def measure(args: argparse.Namespace, device: str, say: Callable[[str], None], save: Callable[[dict], None]) -> dict[str, Any]:
    """What is written; `save` gets it after each video. What fails is told, and the next one is made."""
    import paddle

    import lowbit_video

    from .. import bench
    from ..step.paddle_side import PaddleSide
    from ..step.ways import apply_ours
    from .pipeline import random_pipeline

    paddle.set_device(device)
    published = "bfloat16" if CONFIGS[args.model].get("use_rotary_positional_embeddings") else "float16"
    dtype = "float32" if device == "cpu" else published
    pipe, weights = random_pipeline(args.model, dtype, device, args.low_memory, args.tiny)
    if args.tiles:
        pipe.vae.enable_tiling()
    say(f"CogVideoX-{args.model}, {dtype} on {device}; weights made in "
        + ", ".join(f"{sum(one.seconds):.1f} s ({name})" for name, one in weights.items() if one.seconds))
    about = dict(gpu=PaddleSide().gpu_name(), device=device, tiny=args.tiny, commit=bench.settings.commit(),
                 versions=bench.package_versions())
    result: dict[str, Any] = dict(about=about, model=f"cogvideox-{args.model}", dtype=dtype, steps=args.steps,
                                  low_memory=args.low_memory, tiles=args.tiles, videos=[])
    size = dict(num_frames=args.frames, height=args.height, width=args.width)
    first = None
    for name in [*args.precisions, *args.recipe]:
        say(f"{name} ...")
        try:
            apply_ours(pipe, name)
            one, video = _video(pipe, weights, args.steps, size)
            first = video if first is None else first
            one["sqnr_db"] = _sqnr_db(video, first)
            result.update(frames=video.shape[0], height=video.shape[1], width=video.shape[2])
            say(f"{name}: {one['total_s']:.2f} s")
        except Exception as error:  # noqa: BLE001 - the result says what failed
            one = dict(failed=f"{type(error).__name__}: {error}"[:600])
            say(f"{name} failed: {error!r}"[:1500])
        finally:
            lowbit_video.remove(pipe)
        result["videos"].append(dict(precision=name, **one))
        save(result)
    return result


def _video(pipe: Any, weights: dict[str, Any], steps: int, size: dict[str, int | None]) -> tuple[dict[str, Any], Any]:
    """(seconds, memory and what ran of one video, its pixels [F, H, W, 3]); a short one comes first and does not count."""
    import lowbit_video

    make = lambda steps: pipe(PROMPT, seed=0, num_inference_steps=steps, progress=False, **size)
    make(min(steps, WARM_STEPS))
    before = {name: len(one.seconds) for name, one in weights.items()}
    counted = lowbit_video.coverage(pipe).variants()
    made = make(steps)
    ran = {variant: count - counted.get(variant, 0) for variant, count in lowbit_video.coverage(pipe).variants().items()}
    making = {name: sum(one.seconds[before[name]:]) for name, one in weights.items()}
    seconds = dict(made.timings)
    for stage, part in (("text_encode", "text_encoder"), ("denoise", "transformer")):
        seconds[stage] -= making[part]
    return dict(seconds=seconds, total_s=sum(seconds.values()), step_s=seconds["denoise"] / steps, weights_s=making,
                memory_gib=dict(made.memory) or None, ran={variant: count for variant, count in ran.items() if count}
                ), made.frames[0]


def _sqnr_db(video: Any, first: Any) -> float | None:
    """Of pixels beside the first precision's; None for itself."""
    from .. import accuracy

    return None if video is first else accuracy.sqnr_db(video, first)


def markdown(result: dict[str, Any]) -> str:
    """The result as a table: precisions down, stages across."""
    about = result["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    made = [one for one in result["videos"] if "failed" not in one]
    how = [word for word, on in (("low memory", result["low_memory"]), ("decoded by tiles", result["tiles"])) if on]
    lines = [f"# A whole video on {about['gpu']}", "", f"{versions}; commit {about['commit']}.", ""]
    if made:
        lines += [f"{result['model']} in Paddle, {result['dtype']}, random weights{', '.join(['', *how])}: "
                  f"{result['frames']} frames of {result['height']}x{result['width']}, {result['steps']} denoising steps with "
                  f"guidance. Seconds by stage, after a video of {WARM_STEPS} steps that does not count; making weights is not "
                  "counted. GiB: the most that tensors took in a stage, weights included.", ""]
        head = ["attention", *(f"{title} s" for title in STAGES.values()), "together s", "a step ms", "denoising", "together",
                *(f"{title} GiB" for title in STAGES.values()), "SQNR dB"]
        lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        lines += [_row(one, made[0]) for one in made]
    lines += [""] * bool(made)
    lines += [f"{one['precision']}: " + ", ".join(f"{variant} {count} times" for variant, count in one["ran"].items()) + "."
              for one in made]
    lines += [f"Failed: {one['precision']}: {one['failed']}" for one in result["videos"] if "failed" in one]
    return "\n".join(lines) + "\n"


def _row(one: dict[str, Any], first: dict[str, Any]) -> str:
    seconds, memory = one["seconds"], one["memory_gib"] or {}
    faster = ["", ""] if one is first else [f"{first['seconds']['denoise'] / seconds['denoise']:.2f}x",
                                            f"{first['total_s'] / one['total_s']:.2f}x"]
    cells = [one["precision"], *(f"{seconds[stage]:.2f}" for stage in STAGES), f"{one['total_s']:.2f}",
             f"{one['step_s'] * 1e3:.0f}", *faster, *(f"{memory[stage]:.1f}" if stage in memory else "" for stage in STAGES),
             "" if one["sqnr_db"] is None else f"{one['sqnr_db']:.1f}"]
    return f"| {' | '.join(cells)} |"
