"""One video on several ranks, and again on one: the same video, what every rank ran, what it sent.

    python -m paddle.distributed.launch --nproc_per_node 2 examples/parallel.py            # CPUs, over gloo
    python -m paddle.distributed.launch --devices 0,1 examples/parallel.py --model DIR     # GPUs

What it does, in the library's own words:

    pipe = CogVideoXPipeline.from_pretrained(folder)
    apply(pipe, "int8+fp16")
    handle = parallelize(pipe, ulysses=2)           # None: guidance first, then heads, then the ring
    frames = pipe(prompt, seed=0).frames[0]         # on every rank, each the same
    handle.undo()                                   # each rank computes alone again
"""
import argparse
import os
import sys

from lowbit_video import Recipe, apply, coverage, parallelize, pipelines, remove
from lowbit_video.app.cli import Parser, guarded
from lowbit_video.app.job import SMALL_PROMPT
from lowbit_video.app.ranks import connected, describe, is_first
from lowbit_video.app.run_pipeline import resolve_device, resolve_dtype
from lowbit_video.distributed.exchange import EXCHANGES, OUTPUTS
from lowbit_video.eval.metrics.psnr import psnr
from lowbit_video.pipelines.shared.small_model import model_or_small


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder (default: the small trained model)")
    parser.add_argument("--prompt", default=SMALL_PROMPT)
    parser.add_argument("--precision", default="int8+fp16")
    parser.add_argument("--recipe", metavar="FILE", help="in place of the precision: a recipe's file, or safe or fast")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--frames", type=int, default=17)
    for name in ("ulysses", "ring", "cfg", "vae"):
        parser.add_argument(f"--{name}-degree", type=int)
    parser.add_argument("--exchange", default="auto", choices=EXCHANGES)
    parser.add_argument("--exchange-output", default="16bit", choices=OUTPUTS)
    args = parser.parse_args()
    return guarded(lambda: run(args), "parallel.py")


def run(args: argparse.Namespace) -> int:
    wanted = args.precision if args.recipe is None else Recipe.load(args.recipe)
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's notes would run through the progress bar; errors still show
    device, model = resolve_device("auto"), model_or_small(args.model)
    with connected(device) as wire:
        pipe = pipelines.load(model, dtype=resolve_dtype("auto", device, model), device=device)
        make = lambda: pipe(args.prompt, seed=0, num_inference_steps=args.steps, num_frames=args.frames)
        with parallelize(pipe, args.ulysses_degree, args.ring_degree, args.cfg_degree, args.vae_degree, args.exchange,
                         args.exchange_output, wire) as handle:
            exact = make()
            apply(pipe, wanted)
            handle.mesh.traffic.clear()
            low = make()
            report, ran = handle.report(), coverage(pipe)
    if is_first():  # the others are done
        print(f"\n{ran}\n\n{describe(report)}\n\nagain, on rank 0 alone:")
        low_alone = make()
        remove(pipe)
        exact_alone = make()
        worst = lambda a, b: f"{psnr(a.frames[0], b.frames[0]).min():.1f} dB"
        ranks, seconds = f"{report['ranks']} ranks", [sum(made.timings.values()) for made in (low, low_alone)]
        print(f"\nPSNR of the worst frame\n  exact, {ranks} against one: {worst(exact, exact_alone)}\n"
              f"  {wanted}, {ranks} against one: {worst(low, low_alone)}\n"
              f"  {wanted} against exact on one: {worst(low_alone, exact_alone)} by one rank, "
              f"{worst(low, exact_alone)} by {ranks}\nseconds: {seconds[0]:.1f} on {ranks}, {seconds[1]:.1f} on one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
