"""What `bench parallel` measures, as its command and its processes are told."""
from __future__ import annotations

import argparse
from pathlib import Path

PARTS = ("attention", "step", "decode")
MODELS = ("2b", "5b", "1.5-5b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that a process is started with."""
    parser.add_argument("--framework", choices=("paddle", "torch"), default="paddle")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS),
                        help="what is measured (default: all; decode is Paddle's)")
    parser.add_argument("--shapes", default="CogVideoX-2b;CogVideoX-1.5-5b", metavar="LIST",
                        help="of attention, as in bench kernels (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=["2b"], choices=MODELS, help="whose step (default: 2b)")
    parser.add_argument("--tiles", action="store_true", help="decode by tiles as well")
    parser.add_argument("--precision", nargs="+", default=["int8+fp8"], metavar="PRECISION",
                        help="of attention, one or several: a step is timed by each, a layer by each but exact ones, which is "
                        "timed beside them (default: int8+fp8)")
    parser.add_argument("--recipe", metavar="FILE", help="of the step, at half of the denoising, in place of --precision, "
                        "which attention of a layer keeps: a recipe's file, or safe or fast; a layer whose heads have several "
                        "rungs cannot be shared, and says so")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="of the step, such as \"cfg2 x ulysses2\" (default: all)")
    parser.add_argument("--more", type=int, default=2, metavar="N", help="how many of the step's fastest splits are timed with "
                        "whatever else can travel, too (default: 2)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the step's model (PyTorch)")
    parser.add_argument("--cuda-graph", action="store_true", help="the step as a CUDA graph, one GPU's too (PyTorch)")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each call that count (default: 12 of attention, 5 of "
                        "a step, 2 of decoding)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/parallel.json"), metavar="FILE",
                        help="default: %(default)s")
