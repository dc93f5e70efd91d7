"""`bench step`: the models one after the other, saved after each."""
from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from lowbit_video.files import write_json, write_whole
from lowbit_video.pooled import Pooled
from lowbit_video.rung import pooled_rung

NEEDS = "`bench step` times diffusers' models on PyTorch"
POOLED = "int8+fp8"
"""The precision whose keys `--pooled` pools."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["cogvideox-2b", "wan2.1-1.3b"],
                        help="names of eval/speed/step/models.py, or all (default: cogvideox-2b wan2.1-1.3b)")
    parser.add_argument("--methods", nargs="+", metavar="NAME",
                        help="pytorch, fa2, cudnn, fa4, sage, none (the ceiling) and precisions; the first is what the others "
                             "are checked against (default: all of these, int8+fp8 and int8+fp16); 'int8+fp8 apart' has "
                             "CogVideoX's norms and positions not fused with quantisation")
    parser.add_argument("--pooled", nargs="+", type=float, default=[], metavar="SHARE",
                        help="also int8+fp8 with these shares of the keys kept, such as 0.3, and the model's text always: "
                             "random weights choose at random, but as many")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="FILE", help="also by these recipes, each at half of the "
                        "denoising")
    parser.add_argument("--prologue-apart", action="store_true",
                        help="each of our methods also with CogVideoX's norms and positions apart from quantisation")
    parser.add_argument("--modes", nargs="+", choices=("eager", "blocks", "model"), default=["eager", "blocks"],
                        help="as it is, repeated blocks compiled, compiled whole (default: eager blocks)")
    parser.add_argument("--budget-ms", type=float, default=6000.0, metavar="MS",
                        help="device time of the slowest method's runs; all run equally often (default: 6000)")
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU where there is no GPU: a dry run")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), metavar="FOLDER", help="default: outputs/bench")
    parser.add_argument("--name", default="step", metavar="STEM", help="name of the files written (default: step)")


def run(args: argparse.Namespace) -> int:
    """Measures, writes STEM.json, STEM.md and, where matplotlib is installed, STEM.png; 1 where a method failed."""
    missing = [package for package in ("torch", "diffusers") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"{NEEDS}, and {' and '.join(missing)} cannot be imported; pip install torch 'diffusers>=0.42'")
    import torch
    from diffusers.utils import logging

    from lowbit_video.pipelines.shared.video_files import check_writable

    from .. import bench
    from . import measure, methods, models, table

    chosen = list(models.MODELS) if args.models == ["all"] else args.models
    if unknown := [name for name in chosen if name not in models.MODELS]:
        raise ValueError(f"no model {unknown[0]!r}; there are {', '.join(models.MODELS)}, or all")
    also = methods.with_apart if args.prologue_apart else list
    wanted = list(dict.fromkeys(also([*(args.methods or methods.DEFAULT), *args.recipe])))
    methods.check_methods(wanted)
    for share in args.pooled:
        Pooled(share)  # raises for what is no share
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise ValueError("this needs an NVIDIA GPU, and PyTorch has none here; --tiny is a dry run without one")
    check_writable(args.out / f"{args.name}.json")
    logging.set_verbosity_error()
    about = dict(gpu=torch.cuda.get_device_name() if device == "cuda" else "no GPU", tiny=args.tiny,
                 commit=bench.settings.commit(), versions=bench.package_versions())
    results: list[dict[str, Any]] = []
    for name in chosen:
        print(name, flush=True)
        results.append({})

        def save(result: dict[str, Any]) -> None:
            results[-1] = result
            for row in result["rows"]:
                row["title"] = methods.title(row["method"])
            write_json(args.out / f"{args.name}.json", dict(about=about, models=results))

        entry = models.MODELS[name]
        pooled = [pooled_rung(POOLED, share, entry.leading_text(args.tiny)) for share in args.pooled]
        measure.measure(name, entry, list(dict.fromkeys((*wanted, *also(pooled)))), list(dict.fromkeys(args.modes)), device,
                        args.tiny, args.budget_ms, lambda text: print(f"  {text}", flush=True), save)
        if device == "cuda":
            torch.cuda.empty_cache()
    with write_whole(args.out / f"{args.name}.md") as temporary:
        temporary.write_text(table.markdown(about, results), encoding="utf-8")
    print(table.markdown(about, results))
    if importlib.util.find_spec("matplotlib"):
        table.plot(about, results, args.out / f"{args.name}.png")
    print(f"written: {args.out / args.name}.json and beside it")
    return int(any(result["failed"] for result in results))
