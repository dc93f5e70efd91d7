"""`bench step`: the models one after the other, saved after each; of Paddle, or of both frameworks, in processes of their own.

One process has one framework: Triton has one active driver, and each framework its own context and its own pool of the card's
memory, which the other's peak would count against. And a graph that Paddle cannot run may end the process, not the table.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit_video.files import read_json, write_json, write_whole
from lowbit_video.pooled import Pooled
from lowbit_video.rung import pooled_rung

from .. import timing
from ..cogvideox import CONFIGS
from . import names, table

PACKAGES = {"torch": ("torch", "diffusers"), "paddle": ("paddle",)}
NEEDS = {"torch": "`bench step` times diffusers' models on PyTorch, and {} cannot be imported; pip install torch "
                  "'diffusers>=0.42'",
         "paddle": "`--framework paddle` times this project's models on Paddle, and {} cannot be imported; see README.md"}
PADDLE_MODELS = tuple(f"cogvideox-{size}" for size in CONFIGS)
POOLED = "int8+fp8"
"""The precision whose keys `--pooled` pools."""
WORKER_ARGUMENTS = ("framework", "models", "methods", "pooled", "recipe", "prologue_apart", "modes", "profile", "parts",
                    "budget_ms", "rounds", "limit_s", "go_on", "tiny")
"""What a framework's process is told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument("--framework", nargs="+", choices=tuple(names.FRAMEWORKS), default=["torch"], metavar="NAME",
                        help="torch (diffusers' models), paddle (this project's CogVideoX), or both: each in a process of "
                             "its own, then also Paddle's time over PyTorch's (default: torch)")
    parser.add_argument("--models", nargs="+", metavar="NAME",
                        help="names of eval/speed/step/models.py, or all (default: cogvideox-2b wan2.1-1.3b; with paddle, "
                             "which has the cogvideox-... ones, cogvideox-2b)")
    parser.add_argument("--methods", nargs="+", metavar="NAME",
                        help="pytorch, fa2, cudnn, fa4, sage, paddle, none (the ceiling) and precisions, exact among them; the "
                             "first is what the others are checked against (default: all of the framework's, int8+fp8 and "
                             "int8+fp16); 'int8+fp8 apart' has CogVideoX's norms and positions not fused with quantisation")
    parser.add_argument("--pooled", nargs="+", type=float, default=[], metavar="SHARE",
                        help="also int8+fp8 with these shares of the keys kept, such as 0.3, and the model's text always: "
                             "random weights choose at random, but as many")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="FILE", help="also by these recipes, each at half of the "
                        "denoising")
    parser.add_argument("--prologue-apart", action="store_true",
                        help="each of our methods also with CogVideoX's norms and positions apart from quantisation")
    parser.add_argument("--modes", nargs="+", choices=("eager", "blocks", "model"), default=["eager", "blocks"],
                        help="as it is, repeated blocks compiled (in Paddle: all blocks as one graph), compiled whole "
                             "(default: eager blocks)")
    parser.add_argument("--profile", action="store_true",
                        help="also where an eager step's time goes, by part of CogVideoX's model: norms, projections, "
                             "attention and so on; the host's time, and what makes it wait for the device")
    parser.add_argument("--parts", action="store_true",
                        help="where the device's time goes, by kernel, also of steps that are slower than 5 s; of the others "
                             "it is always told, by one more step of each method")
    parser.add_argument("--budget-ms", type=float, default=6000.0, metavar="MS",
                        help="device time of the slowest method's runs; all run equally often (default: 6000)")
    parser.add_argument("--rounds", type=int, default=timing.LEAST_ROUNDS, metavar="N",
                        help=f"at least so often each is timed, however slow it is (default: {timing.LEAST_ROUNDS})")
    parser.add_argument("--limit-s", type=float, default=math.inf, metavar="SECONDS",
                        help="begin no step of a framework that would end later than this after its first model is begun to be "
                             "made; what is left out is told (default: none is)")
    parser.add_argument("--go-on", action="store_true",
                        help="time only what STEM.json does not have, which must be of the same commit, GPU and packages")
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU where there is no GPU: a dry run")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), metavar="FOLDER", help="default: outputs/bench")
    parser.add_argument("--name", default="step", metavar="STEM", help="name of the files written (default: step)")


def run(args: argparse.Namespace) -> int:
    """Measures, writes STEM.json and STEM.md as it goes and, where matplotlib is, STEM.png; 1 where a method failed."""
    from lowbit_video.pipelines.shared.video_files import check_writable

    frameworks = list(dict.fromkeys(args.framework))
    for framework in frameworks:
        if missing := [package for package in PACKAGES[framework] if importlib.util.find_spec(package) is None]:
            raise ValueError(NEEDS[framework].format(" and ".join(missing)))
    args.models = args.models or (["cogvideox-2b"] if "paddle" in frameworks else ["cogvideox-2b", "wan2.1-1.3b"])
    if args.models == ["all"] and "paddle" in frameworks:
        args.models = list(PADDLE_MODELS)
    if "paddle" in frameworks and (unknown := [name for name in args.models if name not in PADDLE_MODELS]):
        raise ValueError(f"no Paddle model {unknown[0]!r}; there are {', '.join(PADDLE_MODELS)}, or all")
    names.check_methods([*(args.methods or ()), *args.recipe])
    for share in args.pooled:
        Pooled(share)  # raises for what is no share
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}; give 1 or more")
    file = args.out / f"{args.name}.json"
    check_writable(file)
    written = measure_all("torch", args, file) if frameworks == ["torch"] else _in_processes(frameworks, args, file)
    about, results = written["about"], written["models"]
    print(_write(file, written))
    if importlib.util.find_spec("matplotlib") and results:
        table.plot(about, results, file.with_suffix(".png"))
    print(f"written: {file} and beside it")
    return int(any(result["failed"] for result in results) or "ended" in about)


def _write(file: Path, written: dict[str, Any]) -> str:
    """Writes results as JSON and as the page beside it, which is returned."""
    write_json(file, written)
    page = table.markdown(written["about"], written["models"])
    with write_whole(file.with_suffix(".md")) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return page


def _results(file: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file has, if it is there. Raises ValueError where that was measured of another commit or elsewhere."""
    if not file.is_file():
        return []
    written = read_json(file)
    if other := [what for what, value in about.items() if written["about"].get(what) != value]:
        raise ValueError(f"{file} has another {other[0]}: {written['about'].get(other[0])}, not {about[other[0]]}; give "
                         "another --name, or do not --go-on")
    return written["models"]


def methods_for(framework: str, args: argparse.Namespace, both: bool) -> list[str]:
    """What is timed of a framework. both: the other one is as well, so PyTorch, too, has our exact attention."""
    wanted = args.methods or names.DEFAULT[framework]
    if both and not args.methods:
        wanted = dict.fromkeys((*wanted[:-1], names.OURS, wanted[-1]))
    return [*wanted, *args.recipe]


def measure_all(framework: str, args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Measures one framework's models in this process; returns what it wrote to `file`.

    Raises ValueError for a model that the framework does not have, and without a GPU unless models are tiny.
    """
    from .. import bench
    from .measure import measure

    if framework == "torch":
        from .models import MODELS
        from .torch_side import TorchSide as Side
    else:
        from .paddle_models import MODELS
        from .paddle_side import PaddleSide as Side
    chosen = list(MODELS) if args.models == ["all"] else args.models
    if unknown := [name for name in chosen if name not in MODELS]:
        raise ValueError(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}, or all")
    also = names.with_apart if args.prologue_apart else list
    wanted = also(methods_for(framework, args, len(set(args.framework)) > 1))
    side = Side()
    if side.device == "cpu" and not args.tiny:
        raise ValueError(f"this needs an NVIDIA GPU, and {names.FRAMEWORKS[framework]} has none here; --tiny is a dry run "
                         "without one")
    written: dict[str, Any] = dict(about=dict(gpu=side.gpu_name(), tiny=args.tiny, commit=bench.settings.commit(),
                                              versions=bench.package_versions()), models=[])
    there = _results(file, written["about"]) if args.go_on else []
    known = {result["model"]: result for result in there if result["framework"] == framework and result["model"] in chosen}
    written["models"] = [result for result in there if result not in known.values()]
    begin = time.perf_counter()
    for name in chosen:
        print(f"{name}, {names.FRAMEWORKS[framework]}", flush=True)
        written["models"].append({})

        def save(result: dict[str, Any]) -> None:
            written["models"][-1] = result
            for row in (*result["rows"], *result.get("not_timed", ()), *result.get("profiles", ())):
                row["title"] = names.title(row["method"])
            _write(file, written)

        pooled = [pooled_rung(POOLED, share, MODELS[name].leading_text(args.tiny)) for share in args.pooled]
        measure(side, name, list(dict.fromkeys((*wanted, *also(pooled)))), list(dict.fromkeys(args.modes)), args.tiny,
                args.budget_ms, lambda text: print(f"  {text}", flush=True), save, args.profile, args.rounds, known.get(name),
                lambda: begin + args.limit_s - time.perf_counter(), args.parts)
        side.release()
    return written


def _in_processes(frameworks: Sequence[str], args: argparse.Namespace, file: Path) -> dict[str, Any]:
    """The same of each framework in a process of its own, one after the other; returns what it wrote to `file`.

    Raises ValueError where none of them measured anything.
    """
    given = json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
                        if name in WORKER_ARGUMENTS})
    about, ended = {}, {}
    there = read_json(file) if args.go_on and file.is_file() else dict(models=[])
    models = [result for result in there["models"] if result["framework"] not in frameworks]
    for framework in frameworks:
        part = file.with_name(f"{file.stem}.{framework}.json")
        part.unlink(missing_ok=True)
        if own := [result for result in there["models"] if result["framework"] == framework]:
            write_json(part, dict(about=there["about"], models=own))
        status = subprocess.run([sys.executable, "-m", "lowbit_video.eval.speed.step.worker", framework, given, str(part)]
                                ).returncode
        if status:
            ended[names.FRAMEWORKS[framework]] = status
        if part.is_file():
            written = read_json(part)
            about = about or written["about"]
            models += written["models"]
            part.unlink()
            part.with_suffix(".md").unlink(missing_ok=True)
    if not about:
        raise ValueError(f"nothing was measured; the processes ended with status {', '.join(map(str, ended.values()))}, and "
                         "what they said is above")
    written = dict(about={**about, **({"ended": ended} if ended else {})}, models=models)
    write_json(file, written)
    return written
