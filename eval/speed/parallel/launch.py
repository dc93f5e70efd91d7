"""Starts the processes of `bench parallel`: Paddle's by its launcher, PyTorch's by torchrun."""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.precision import PRESETS, as_precision
from lowbit_video.runtime import cuda_driver

from .step import splits


def launch(args: argparse.Namespace) -> int:
    """Runs one process for each GPU; returns their exit status.

    Raises ValueError where there are too few GPUs, for a precision or a split that does not exist, a recipe that cannot be
    read and what cannot be compiled or be a CUDA graph.
    """
    if args.compile and args.framework != "torch":
        raise ValueError(f"--compile compiles diffusers' blocks, and --framework is {args.framework}; add --framework torch, "
                         "or leave it out")
    if args.cuda_graph and args.framework != "torch":
        raise ValueError(f"--cuda-graph records PyTorch's launches, and --framework is {args.framework}; add --framework "
                         "torch, or leave it out")
    for precision in args.precision:
        as_precision(precision)
    recipe = args.recipe
    if recipe is not None:
        Recipe.load(recipe)
        recipe = recipe if recipe in PRESETS else str(Path(recipe).resolve())
    there = cuda_driver.device_count()
    if not 2 <= args.gpus <= there:
        raise ValueError(f"--gpus {args.gpus}: this machine has {there} NVIDIA GPUs, and two at least are needed")
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: one at least is needed")
    if odd := set(args.splits or ()) - set(known := splits(args.gpus)):
        raise ValueError(f"no such split by {args.gpus} GPUs: {', '.join(sorted(odd))}; there are: {', '.join(known)}")
    given = ["--framework", args.framework, "--parts", *args.parts, "--shapes", args.shapes, "--models", *args.models,
             "--more", str(args.more), "--precision", *args.precision, "--out", str(args.out.resolve()),
             *(["--tiles"] if args.tiles else []), *(["--compile"] if args.compile else []),
             *(["--cuda-graph"] if args.cuda_graph else []),
             *(["--recipe", recipe] if recipe else []), *(["--splits", *args.splits] if args.splits else []),
             *(["--rounds", str(args.rounds)] if args.rounds else [])]
    environment = {"OMP_NUM_THREADS": "4", **os.environ}
    if args.framework == "torch":
        command = ["-m", "torch.distributed.run", f"--nproc_per_node={args.gpus}", "-m",
                   "lowbit_video.eval.speed.parallel.worker"]
        return subprocess.run([sys.executable, *command, *given], env=environment).returncode
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "worker.py")  # Paddle's launcher runs files, not modules
        script.write_text("from lowbit_video.eval.speed.parallel.worker import main\n\nmain()\n")
        devices = ",".join(map(str, range(args.gpus)))
        command = ["-m", "paddle.distributed.launch", "--devices", devices, "--log_dir", str(Path(folder, "log")), str(script)]
        return subprocess.run([sys.executable, *command, *given], env=environment).returncode
