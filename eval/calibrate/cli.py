"""`lowbit-video calibrate`: a recipe for a model and a budget."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lowbit_video.token_order import ORDERS

from ..cli import add_model, count, load, names, put_in_order, say, settings_of

DEFAULT_OUT = Path("outputs/calibrate/recipe.toml")
HELP = "a recipe for a model: which bit width each layer and step needs"
DESCRIPTION = ("Measure each precision's error by layer, head and range of steps on a few prompts, weigh it by what reaches "
               "the final latent, price it by a kernel benchmark, and write the recipe that meets the budget, with a picture "
               "beside it. A second start goes on where the first one was stopped.")


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Registers `lowbit-video calibrate`."""
    parser = subparsers.add_parser("calibrate", help=HELP, description=DESCRIPTION)
    add_model(parser)
    parser.add_argument("--framework", choices=("paddle", "torch"), default="paddle", help="torch: through diffusers' "
                        "CogVideoXPipeline, --device as torch names it (default: %(default)s)")
    parser.add_argument("--budget", metavar="45dB|1.1x|6bit", help="dB of the final latent at least, or times int8+fp8's time "
                        "in attention at most, or bits of Q and K in the mean at most")
    parser.add_argument("--scheme", choices=("measured", "seed"), default="measured", help="what chooses: measured errors, or "
                        "the sizes of Q, K and V (with a budget of bits, or none) (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="FILE", help="the recipe, which ends in .toml "
                        "(default: %(default)s)")
    parser.add_argument("--measured", type=Path, metavar="DIR", help="where what is measured is kept, for further budgets "
                        "(default: beside the recipe)")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line; # begins a comment")
    parser.add_argument("--limit", type=count, default=2, metavar="N", help="prompts that are measured (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=1, metavar="N", help="prompts after these that check the recipe "
                        "(default: %(default)s)")
    parser.add_argument("--rungs", type=names, metavar="A,B", help="precisions to choose from (default: exact, and all that "
                        "may pay)")
    parser.add_argument("--pooled", type=shares, metavar="A,B", help="shares of the keys that further rungs keep at int8+fp8 "
                        "while the rest is pooled, or none; of no use where bits are counted (default: 0.2,0.3,0.5,0.7)")
    parser.add_argument("--pooled-from", type=count, metavar="N", help="tokens from which there are such rungs (default: where "
                        "pooling is taken to pay)")
    parser.add_argument("--order", choices=ORDERS, default="raster", help="of the video's tokens in attention; pooled rungs "
                        "gain by another (default: %(default)s)")
    parser.add_argument("--by-head", action="store_true", help="heads of a layer may differ; each rung's heads then are a call "
                        "of their own")
    parser.add_argument("--ranges", type=count, default=4, metavar="N", help="ranges of steps (default: %(default)s)")
    parser.add_argument("--samples", type=count, default=1, metavar="N", help="steps of each range that are recorded (default: "
                        "%(default)s)")
    parser.add_argument("--rows", type=count, default=128, metavar="N", help="query rows that are compared (default: "
                        "%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--speed", type=Path, metavar="FILE", help="JSON of `lowbit-video bench kernels` that prices the "
                        "precisions (default: the checkout's)")
    parser.add_argument("--backend", default="auto", help="auto, reference, triton or hopper")
    parser.set_defaults(run=run)


def shares(text: str) -> tuple[float, ...]:
    """Shares between 0 and 1, such as "0.2,0.5", or "none"."""
    if text == "none":
        return ()
    try:
        found = tuple(float(part) for part in names(text))
    except ValueError:
        found = ()
    if not found or not all(0 < share < 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares between 0 and 1, such as 0.2,0.5; or none")
    return found


def load_torch(args: argparse.Namespace) -> tuple[Any, Any]:
    """As `eval.cli.load`, through diffusers."""
    from .torch_pipeline import TorchPipeline

    return TorchPipeline(args.model, args.dtype, args.device), settings_of(args)


def run(args: argparse.Namespace) -> int:
    """`calibrate`: mistakes first, the model afterwards."""
    from lowbit_video.pipelines.shared.small_model import model_or_small
    from lowbit_video.pipelines.shared.video_files import check_writable
    from lowbit_video.rung import parts_of_rung

    from ..compare.paired import read_prompts
    from . import scales
    from .costs import TABLE, UNIT, bits_of, costs_of
    from .pooled import PooledPlan
    from .run import RUNGS, Plan, calibrate, check_budget
    from .solve import Budget, check_cost

    budget = None if args.budget is None else Budget.parse(args.budget)
    check_budget(budget, args.scheme)
    prompts, by_bits = read_prompts(args.prompts), args.scheme == "seed" or budget.bits is not None
    if args.out.suffix != ".toml":
        raise ValueError(f"--out is {args.out}; a recipe's file ends in .toml")
    if args.held_out < 0 or len(prompts) < args.limit + args.held_out:
        raise ValueError(f"{args.prompts} has {len(prompts)} prompts; {args.limit} are to be measured and {args.held_out} held "
                         "out")
    rungs = tuple(args.rungs or (scales.RUNGS if by_bits else RUNGS))
    for rung in rungs:
        parts_of_rung(rung)
    speed = args.speed or TABLE
    if by_bits:
        check_cost(budget, bits_of(rungs).of.values())
    else:
        costs_of([UNIT], 1, 64, speed)
    pooled = {"shares": args.pooled, "least": args.pooled_from}
    plan = Plan(rungs, ranges=args.ranges, samples=args.samples, rows=args.rows, by_head=args.by_head, scheme=args.scheme,
                pooled=PooledPlan(**{name: value for name, value in pooled.items() if value is not None}))
    args.model = model_or_small(args.model)
    check_writable(args.out)
    pipe, settings = load(args) if args.framework == "paddle" else load_torch(args)
    put_in_order(pipe, args)
    calibrate(pipe, prompts[:args.limit], budget, args.out, held_out=prompts[args.limit:args.limit + args.held_out],
              settings=settings, plan=plan, seed=args.seed, speed=speed, backend=args.backend, kept=args.measured, say=say)
    return 0
