"""How long does the small model's denoising take by each attention? All in turns, in one process, with nothing beside it.

    python examples/small_cogvideox/time_precisions.py --model examples/small_cogvideox/long/model --dtype float16 \
        --steps 25 --compile --cuda-graph --precisions int8+fp8 int8+fp16 --out outputs/seconds_float16.json

`evaluate_precisions.py` times one run after the other while it makes its videos, maybe beside other processes; what lies within
a few per cent it cannot tell. Here every run has a transformer of its own, hooked (with `--compile` compiled, with
`--cuda-graph` recorded) once; then each caption is denoised by all runs, every other round backwards, and a speed-up is of
pairs that were timed within seconds of each other. Seconds are of the whole loop of denoising, the scheduler's part included.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
from pathlib import Path

import numpy as np
import torch
from evaluate_precisions import CAPTION_SEED
from makers import DTYPES, MODEL, OTHERS, TorchMaker, check_request, hooked, latent_shape, runs_of
from precision_table import as_dict, cell, is_exact
from sampling import held_out_captions, noise_of

from lowbit_video.eval import world
from lowbit_video.eval.compare.settings import environment
from lowbit_video.eval.report.bootstrap import bootstrap
from lowbit_video.files import write_json
from lowbit_video.hook.order import order_tokens
from lowbit_video.pipelines.shared.generation import read_stored
from lowbit_video.token_order import ORDERS

WARM = 2  # videos of each run that do not count: kernels are compiled, planned and recorded in them
MOST_GRAPHS = 64  # of a block: each run has its own


def own(maker: TorchMaker) -> TorchMaker:
    """A maker with a transformer of its own; the rest of the pipeline is the same."""
    one, parts = copy.copy(maker), maker.pipe.components
    one.pipe = type(maker.pipe)(**{**parts, "transformer": copy.deepcopy(parts["transformer"])})
    return one


def seconds_of(makers: dict[str, TorchMaker], captions: list[str], noises: list[torch.Tensor], rounds: int) -> dict[str, list]:
    """Seconds of each run, [rounds][captions], in turns: each caption by all runs, every other round backwards."""
    seconds = {label: [] for label in makers}
    for maker in makers.values():
        for _ in range(WARM):
            maker.make(captions[0], noises[0])
    for turn in range(rounds):
        for label in makers:
            seconds[label].append([])
        for caption, noise in zip(captions, noises):
            for label in list(makers)[::-1 if turn % 2 else 1]:
                seconds[label][-1].append(round(makers[label].make(caption, noise)[1], 5))
        print(f"round {turn + 1}: " + ", ".join(f"{label} {np.median(found[-1]):.4f} s" for label, found in seconds.items()),
              flush=True)
    return seconds


def rows_of(seconds: dict[str, list]) -> tuple[dict[str, dict], str]:
    """(Each run's median of seconds and its speed-up over the fastest exact attention, both with intervals; which that is).

    A speed-up is the median of the ratios of pairs: the same caption in the same round."""
    median = lambda values: np.median(values, -1)
    every = {label: np.ravel(found) for label, found in seconds.items()}
    best = min(filter(is_exact, every), key=lambda label: median(every[label]))
    return {label: {"seconds": as_dict(bootstrap(median, found)),
                    "speed_up": as_dict(bootstrap(median, every[best] / found)), "timed": seconds[label]}
            for label, found in every.items()}, best


def markdown(record: dict) -> str:
    """The table."""
    where = record["environment"]
    how = ", blocks compiled" * record["compiled"] + ", as CUDA graphs" * record["cuda_graph"]
    lines = [f"Denoising, {record['steps']} steps, {record['dtype']}, on {where['device']}{how}, commit {where['commit']}: "
             f"{record['captions']} captions in {record['rounds']} rounds; speed-up: over {record['best_exact']}, in pairs.",
             "", "| attention | seconds | speed-up |", "|---|---|---|"]
    lines += [f"| {label} | {cell(row, 'seconds', '{:.4f}'.format)} | {cell(row, 'speed_up', '{:.3f}'.format)}x |"
              for label, row in record["rows"].items()]
    return "\n".join(lines) + "\n"


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--out", type=Path, default=Path("outputs/seconds.json"), metavar="FILE.json", help="beside it, a .md")
    parser.add_argument("--dtype", choices=DTYPES, help="of the whole pipeline; default: bfloat16 on a GPU")
    parser.add_argument("--precisions", nargs="+", default=["int8+fp8", "int8+fp16"], help="also with pooled keys, and recipes")
    parser.add_argument("--order", choices=ORDERS, default="raster", help="of the video's tokens in attention, of all runs")
    parser.add_argument("--other-exact", nargs="*", choices=OTHERS, default=list(OTHERS), help="further exact kernels to run")
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the transformer's blocks")
    parser.add_argument("--cuda-graph", action="store_true", help="the transformer as one CUDA graph (on a GPU)")
    parser.add_argument("--backend", default="auto", help="of the precisions: auto, reference, triton or hopper")
    parser.add_argument("--seed", type=int, default=CAPTION_SEED, help="of the captions and of the noise")
    parser.add_argument("--device", help="default: the GPU if there is one")
    args = parser.parse_args(argv)
    check_request(parser, args)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    generation = read_stored(args.model)
    generation["num_inference_steps"] = args.steps or generation["num_inference_steps"]
    captions = held_out_captions(args.captions, args.seed, generation.get("world", world.SMALL.name))
    maker = TorchMaker(args.model, args.dtype, args.device, generation)
    runs, absent = runs_of(maker, args.precisions, args.other_exact)
    noises = [noise_of(1, latent_shape(maker), args.seed + number) for number in range(len(captions))]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    with contextlib.ExitStack() as around:
        makers = {}
        for run in runs:
            makers[run.label] = one = own(maker)
            order_tokens(one.pipe, args.order)
            for context in (hooked(one, run, args.backend), one.compiled(args.compile), one.graphed(args.cuda_graph)):
                around.enter_context(context)
        seconds = seconds_of(makers, captions, noises, args.rounds)
    rows, best = rows_of(seconds)
    record = {"model": str(args.model), "dtype": args.dtype, "backend": args.backend, "reference": maker.reference,
              "missing": absent, "compiled": args.compile, "cuda_graph": args.cuda_graph, "order": args.order,
              "steps": generation["num_inference_steps"], "captions": args.captions, "rounds": args.rounds, "best_exact": best,
              "environment": {**environment(), "device": maker.device_name}, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, record)
    args.out.with_suffix(".md").write_text(markdown(record))
    print(markdown(record), end="", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
