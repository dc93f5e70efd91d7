"""One process for each GPU of `bench parallel`: measures with the others; rank 0 prints and writes."""
from __future__ import annotations

import argparse
import os
import sys
import traceback

from lowbit_video.distributed.keys_part import MOST_BYTES
from lowbit_video.files import write_json, write_whole
from lowbit_video.precision import as_precision

from .. import bench
from ..shapes import parse_shapes
from . import attention, decode, step, table
from .arguments import add_arguments
from .clock import Clock, wire_and_like


def main(argv: list[str] | None = None) -> None:
    """Measures and ends the process: Paddle tears its communicators down after the CUDA runtime is gone, and would hang."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    status = 1
    try:
        _measure(args)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _measure(args: argparse.Namespace) -> None:
    wire, like = wire_and_like(args.framework)
    clock = Clock(wire, like)
    say = (lambda text: print(text, flush=True)) if wire.rank == 0 else (lambda text: None)
    about = bench.environment(args.framework) if wire.rank == 0 else {}
    result: dict = {**about, "ranks": wire.size, "keys": "gathered" if MOST_BYTES else "round", "attention": [], "steps": [],
                    "decode": None}

    def save() -> None:
        if wire.rank == 0:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, result)
            with write_whole(args.out.with_suffix(".md")) as temporary:
                temporary.write_text(table.markdown([result]), encoding="utf-8")

    if "attention" in args.parts:
        for shape in parse_shapes(args.shapes):
            for precision in [one for one in args.precision if not as_precision(one).exact] or args.precision[:1]:
                result["attention"].append(attention.measure(shape, precision, wire, clock, say, args.rounds))
                save()
    if "step" in args.parts:
        for model in args.models:
            for precision in [args.recipe] if args.recipe else args.precision:
                result["steps"].append(step.measure(model, precision, args.framework, wire, clock, say, args.rounds,
                                                    args.splits, args.more, args.compile, args.cuda_graph))
                save()
    if "decode" in args.parts and args.framework == "paddle":
        result["decode"] = decode.measure(wire, clock, say, args.tiles, args.rounds)
        save()
    wire.barrier()


if __name__ == "__main__":
    main()
