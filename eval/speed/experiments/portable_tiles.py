"""Time tiles of the portable kernel beside the tuning table's own: more of them than `lowbit-video bench tune` tries.

    python -m lowbit_video.eval.speed.experiments.portable_tiles [--shapes LIST] [--table]

Uses PyTorch tensors; the tuner checks and times, and prints the fastest four of each. --table: few rivals of fewer precisions.
"""
from __future__ import annotations

import argparse
from functools import partial

from lowbit_video.kernels.tuning import TileConfig, family, lookup
from lowbit_video.runtime import detect

from .. import tune
from ..shapes import parse_shapes

# rows x keys, warps, stages, register cap (0: none), row sums by tensor cores (1); by (Q and K format, P.V format, head dim)
TILES = {
    ("int8", "fp16", 64): "64x128 4 2 0 0, 64x128 4 2 0 1, 64x128 4 3 0 1, 128x128 8 2 0 1, 128x64 4 3 0 1, "
                          "64x64 4 3 0 1, 128x64 8 3 0 1, 64x128 4 2 128 1, 64x128 4 2 128 0",
    ("int8", "fp16", 128): "64x128 4 2 0 0, 64x128 4 2 0 1, 128x128 8 2 0 1, 128x128 8 2 0 0, 128x128 8 3 0 1, "
                           "64x64 4 3 0 1, 64x64 4 3 168 0, 128x64 8 3 0 1, 128x64 8 3 128 1, 128x64 4 3 0 0, 128x64 4 3 0 1, "
                           "64x128 4 2 168 1",
    ("int8", "fp8", 64): "64x128 4 3 0 0, 64x128 4 3 128 0, 64x128 4 2 128 0, 64x128 4 3 168 0, 64x128 4 3 168 1, "
                         "64x128 4 3 128 1, 128x128 8 3 0 0, 64x64 4 3 0 0",
    ("int8", "fp8", 128): "64x128 4 2 0 0, 64x128 4 2 168 0, 64x128 4 2 168 1, 64x128 4 3 0 0, 128x128 8 3 0 0, "
                          "128x128 8 2 0 1, 64x64 4 3 168 0, 128x64 8 3 0 0",
    ("fp8", "fp8", 64): "64x128 4 3 0 0, 64x128 4 3 128 0",
    ("fp8", "fp8", 128): "64x128 4 2 0 0, 64x128 4 2 168 0",
    ("int4", "fp16", 64): "64x128 4 2 0 0, 128x64 8 3 0 1, 64x128 4 2 0 1",
    ("int4", "fp16", 128): "64x128 4 2 0 0, 128x64 8 3 0 1, 64x64 4 3 0 1",
    ("int4", "fp8", 64): "64x128 4 3 168 0, 128x64 8 3 0 0",
    ("int4", "fp8", 128): "64x128 4 2 0 0, 128x64 8 3 0 0",
    ("fp16", "fp16", 64): "64x128 4 2 0 0, 64x128 4 2 0 1, 128x128 8 2 0 1, 128x64 8 3 0 1, 64x64 4 3 0 1, 128x64 4 3 0 1",
    ("fp16", "fp16", 128): "64x128 4 2 0 1, 128x128 8 2 0 0, 128x128 8 2 0 1, 128x64 8 3 0 1, 64x64 4 3 0 1",
}
RIVALS = {  # beside the tuning table's own tile, with --table
    ("int8", "fp16", 64): "64x128 4 2 0 0, 128x64 4 3 0 0, 64x64 4 3 0 0",
    ("int8", "fp16", 128): "64x64 4 2 0 0, 64x128 4 2 0 0, 128x64 4 3 0 1, 128x128 8 3 0 0",
    ("int8", "fp8", 64): "64x128 4 2 128 0, 64x128 4 3 0 0, 64x128 4 4 0 0",
    ("int8", "fp8", 128): "64x128 4 2 168 0, 64x128 4 3 168 0, 64x128 4 3 0 0",
    ("int4", "fp16", 128): "",
    ("int4", "fp8", 64): "",
    ("fp16", "fp16", 64): "64x128 4 2 0 0, 64x64 4 2 0 0",
    ("fp16", "fp16", 128): "64x64 4 2 0 0, 64x64 4 3 0 0",
}


def parse_tiles(text: str) -> list[TileConfig]:
    """Every tile in a row of TILES."""
    tiles = []
    for item in filter(None, text.split(",")):
        shape, *rest = item.split()
        warps, stages, registers, sum_mma = map(int, rest)
        block_m, block_n = map(int, shape.split("x"))
        tiles.append(TileConfig(block_m, block_n, warps, stages, max_registers=registers or None, sum_mma=bool(sum_mma)))
    return tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default="2,30,17776,64;1,24,32768,128;4,32,8192,128")
    parser.add_argument("--table", action="store_true", help="the tuning table's tiles and few rivals only")
    options = parser.parse_args()
    like = detect.anchor("torch")
    arch = detect.runtime_of(like).arch(like)
    for shape in parse_shapes(options.shapes):
        for (q, pv, head_dim), text in (RIVALS if options.table else TILES).items():
            if head_dim == shape.head_dim:
                own = lookup(family(q, q, pv), arch, head_dim)
                print(f"{shape} {q}+{pv}: the table has {tune.describe(own)}", flush=True)
                spec = "exact" if q == pv == "fp16" else f"{q}+{pv}"
                tune.fastest(shape, spec, "triton", list(dict.fromkeys([own, *parse_tiles(text)])), "torch", "float16",
                             partial(print, flush=True))


if __name__ == "__main__":
    main()
