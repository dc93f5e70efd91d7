"""Tile shapes of the portable attention kernel: data, found by measurement, overridable by a file.

`lookup` takes the nearest row: same family and padded head dim, the newest arch not newer than the device.
A JSON file in the same form, named by LOWBIT_VIDEO_TUNING or passed to `load`, goes first.
"""
from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .formats import get_format

ENVIRONMENT = "LOWBIT_VIDEO_TUNING"
"""Environment variable that names a JSON file of tuning rows."""


@dataclass(frozen=True)
class TileConfig:
    """Rows and keys of a tile, warps, pipeline stages.

    max_registers: cap per thread, so that more programs share an SM. sum_mma: row sums of the 16-bit P by tensor cores
    (a product with ones) instead of float32 adds.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    sum_mma: bool = False

    def __post_init__(self) -> None:
        if self.block_m not in (16, 32, 64, 128) or self.block_n not in (16, 32, 64, 128):
            raise ValueError(f"tile {self.block_m}x{self.block_n} is not supported: both sides are 16, 32, 64 or 128")


def padded_head_dim(head_dim: int) -> int:
    """The head dim that tiles are filed under: 64, 128 or 256."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def family(q: str, k: str, pv: str) -> str:
    """Name of the tuning family of a kernel: its operand widths, such as "int8+fp16", "int4+fp8", "fp16" or "fp32" (exact)."""
    if k == "fp32":
        return "fp32"
    if k in ("fp16", "bf16"):
        return "fp16"
    return f"{k}+{'fp8' if pv == 'fp8' else 'fp16'}"


# (family, arch, padded head dim) -> tile. sm_90's rows are the fastest on an H200 (eval/speed/NOTES.md), int2's are int4's.
TABLE: dict[tuple[str, tuple[int, int], int], TileConfig] = {
    ("int8+fp16", (8, 0), 64): TileConfig(128, 64, 4, 3),
    ("int8+fp16", (8, 0), 128): TileConfig(128, 64, 8, 3),
    ("int8+fp16", (8, 0), 256): TileConfig(64, 32, 4, 2),
    ("int8+fp8", (8, 9), 64): TileConfig(128, 64, 4, 3),
    ("int8+fp8", (8, 9), 128): TileConfig(128, 64, 8, 3),
    ("int8+fp8", (8, 9), 256): TileConfig(64, 32, 4, 2),
    ("fp16", (8, 0), 64): TileConfig(128, 64, 4, 3),
    ("fp16", (8, 0), 128): TileConfig(128, 64, 8, 3),
    ("fp16", (8, 0), 256): TileConfig(64, 32, 4, 2),
    ("int8+fp16", (9, 0), 64): TileConfig(64, 128, 4, 2),
    ("int8+fp16", (9, 0), 128): TileConfig(64, 128, 4, 2),
    ("int8+fp16", (9, 0), 256): TileConfig(64, 64, 4, 2),
    ("int8+fp8", (9, 0), 64): TileConfig(64, 128, 4, 2, max_registers=128),
    ("int8+fp8", (9, 0), 128): TileConfig(64, 128, 4, 2, max_registers=168),
    ("int8+fp8", (9, 0), 256): TileConfig(64, 64, 4, 2),
    ("int4+fp16", (9, 0), 64): TileConfig(64, 128, 4, 2),
    ("int4+fp16", (9, 0), 128): TileConfig(64, 128, 4, 2),
    ("int4+fp8", (9, 0), 64): TileConfig(64, 128, 4, 3, max_registers=168),
    ("int4+fp8", (9, 0), 128): TileConfig(64, 128, 4, 2),
    ("int2+fp16", (9, 0), 64): TileConfig(64, 128, 4, 2),
    ("int2+fp16", (9, 0), 128): TileConfig(64, 128, 4, 2),
    ("int2+fp8", (9, 0), 64): TileConfig(64, 128, 4, 3, max_registers=168),
    ("int2+fp8", (9, 0), 128): TileConfig(64, 128, 4, 2),
    ("fp16", (9, 0), 64): TileConfig(128, 64, 4, 3, sum_mma=True),
    ("fp16", (9, 0), 128): TileConfig(64, 64, 4, 3),
    ("fp16", (9, 0), 256): TileConfig(64, 64, 4, 2),
    # float32 fills shared memory and, in three TF32 terms, registers: the largest tiles that fit both, not measured
    ("fp32", (8, 0), 64): TileConfig(64, 32, 4, 2),
    ("fp32", (8, 0), 128): TileConfig(32, 32, 4, 2),
    ("fp32", (8, 0), 256): TileConfig(16, 32, 8, 1),
    ("fp32", (9, 0), 64): TileConfig(64, 64, 4, 2),
    ("fp32", (9, 0), 128): TileConfig(64, 32, 4, 2),
    ("fp32", (10, 0), 128): TileConfig(32, 32, 4, 2),
    ("fp32", (12, 0), 64): TileConfig(64, 32, 4, 2),
    ("fp32", (12, 0), 128): TileConfig(32, 32, 4, 2),
    # not measured: the tiles that compile without spills
    ("int8+fp16", (10, 0), 64): TileConfig(64, 128, 4, 3),
    ("int8+fp16", (10, 0), 128): TileConfig(128, 128, 8, 2),
    ("int8+fp8", (10, 0), 64): TileConfig(64, 128, 4, 3),
    ("int8+fp8", (10, 0), 128): TileConfig(64, 128, 4, 2),
    # Triton 3.8 and 3.9 refuse the layout that they give K unpacked from int2, for tcgen05, in a larger tile
    ("int2+fp16", (10, 0), 64): TileConfig(64, 64, 4, 3),
    ("int2+fp8", (10, 0), 64): TileConfig(64, 64, 4, 3),
    ("fp16", (10, 0), 64): TileConfig(128, 128, 8, 2),
    ("fp16", (10, 0), 128): TileConfig(128, 128, 8, 2),
    # sm_120 has TMA but sm_89's shared memory and mma.sync
    ("int8+fp16", (12, 0), 64): TileConfig(128, 64, 4, 3),
    ("int8+fp16", (12, 0), 128): TileConfig(128, 64, 8, 2),
    ("int8+fp16", (12, 0), 256): TileConfig(64, 32, 4, 2),
    ("int8+fp8", (12, 0), 64): TileConfig(128, 64, 4, 3),
    ("int8+fp8", (12, 0), 128): TileConfig(128, 64, 8, 3),
    ("int8+fp8", (12, 0), 256): TileConfig(64, 32, 4, 2),
    ("fp16", (12, 0), 64): TileConfig(128, 64, 4, 3),
    ("fp16", (12, 0), 128): TileConfig(128, 64, 8, 2),
    ("fp16", (12, 0), 256): TileConfig(64, 32, 4, 2),
}
"""Measured tiles; families without a row of their own use int8's."""


# (variant, P.V format, arch, padded head dim) -> tokens. Below, quantisation and launches cost more than they save.
FASTER_FROM: dict[tuple[str, str, tuple[int, int], int], int] = {
    ("hopper-int8", "fp16", (9, 0), 64): 4096,
    ("hopper-int8", "fp16", (9, 0), 128): 2048,
    ("hopper-int8", "fp8", (9, 0), 64): 4096,
    ("hopper-int8", "fp8", (9, 0), 128): 2048,
    ("hopper-fp8", "fp8", (9, 0), 64): 4096,
    ("hopper-fp8", "fp8", (9, 0), 128): 2048,
    ("triton-int-fp16", "fp16", (9, 0), 64): 4096,
    ("triton-int-fp16", "fp16", (9, 0), 128): 2048,
    ("triton-int-fp8", "fp8", (9, 0), 64): 2048,
    ("triton-int-fp8", "fp8", (9, 0), 128): 2048,
    ("triton-fp8", "fp8", (9, 0), 64): 2048,
    ("triton-fp8", "fp8", (9, 0), 128): 2048,
}
"""Shortest K and V from which a variant beats exact attention; without a row, DEFAULT_FASTER_FROM.

The longer of what eval/speed/results/lengths.json (`bench tune --lengths-only`) and sweep.json (`bench kernels
--shapes sweep`) found: they differ in batch and by noise, and near the crossing nothing is lost by exact attention.
"""
DEFAULT_FASTER_FROM = 1024
TMA_ARCHS, TMA_BYTES = ((9, 0), (12, 0)), 16
"""The archs on which kernels read by TMA, the second excluded, and what rows must be multiples of for it."""


def _as_rows(entries: list[dict]) -> dict[tuple[str, tuple[int, int], int], TileConfig]:
    return {(e["family"], tuple(e["arch"]), e["head_dim"]): TileConfig(**e["config"]) for e in entries if "config" in e}


@cache
def load(path: str) -> dict[tuple[str, tuple[int, int], int], TileConfig]:
    """Rows of a JSON tuning file; ValueError if it is not one."""
    try:
        return _as_rows(json.loads(Path(path).read_text()))
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is not a tuning file ({e}); write one with `lowbit-video bench tune`") from e


def _nearest(rows: dict, names: list[str], arch: tuple[int, int], head_dim: int) -> TileConfig | None:
    """The row of the newest arch that is not newer, of the first of the names that has one there."""
    fits = [(a, -names.index(f), f) for f, a, d in rows if f in names and d == head_dim and a <= arch]
    if not fits:
        return None
    newest, _, name = max(fits)
    return rows[name, newest, head_dim]


def lookup(name: str, arch: tuple[int, int], head_dim: int) -> TileConfig:
    """The tile for a `family`, an arch such as (9, 0) and a head dim (padded up to 64, 128 or 256).

    Raises ValueError if no row fits: the arch is older than any that the family runs on.
    """
    padded, arch = padded_head_dim(head_dim), tuple(arch)
    names = [name]
    if name.startswith(("int4", "int2", "fp8")):
        names.append("int8" + name[name.index("+"):])
    tables = [TABLE]
    if os.environ.get(ENVIRONMENT):
        tables.insert(0, load(os.environ[ENVIRONMENT]))
    for rows in tables:
        config = _nearest(rows, names, arch, padded)
        if config is not None:
            return config
    raise ValueError(f"no tile for {name} on sm_{arch[0]}{arch[1]} at head dim {head_dim}; "
                     f"families: {', '.join(sorted({f for f, _, _ in TABLE}))}; int8+fp16 needs sm_80, FP8 sm_89")


@cache
def load_lengths(path: str) -> dict[tuple[str, str, tuple[int, int], int], int]:
    """The shortest useful lengths of a JSON tuning file, in the form of FASTER_FROM."""
    load(path)  # says what is wrong with the file
    entries = json.loads(Path(path).read_text())
    return {(e["variant"], e["pv"], tuple(e["arch"]), e["head_dim"]): e["faster_from"] for e in entries if "faster_from" in e}


def slow_rows(k_format: str, arch: tuple[int, int], head_dim: int) -> str | None:
    """Why keys of this head dim are slow to read on an arch that has TMA, or None.

    Measured at head dim 72: 16384 tokens take longer at int8+fp8 than exactly (eval/speed/results/ppdiffusers_step.json).
    """
    row = head_dim // get_format(k_format).codes_per_byte
    if TMA_ARCHS[0] <= tuple(arch) < TMA_ARCHS[1] and row % TMA_BYTES:
        return f"a key's {k_format} codes take {row} bytes, no multiple of {TMA_BYTES}, and TMA cannot read them"
    return None


def faster_from(variant: str, pv: str, arch: tuple[int, int], head_dim: int) -> int:
    """Tokens of K and V from which a variant is measured to be faster than exact attention on an arch (or the next older)."""
    padded = padded_head_dim(head_dim)
    path = os.environ.get(ENVIRONMENT)
    for table in (load_lengths(path) if path else {}, FASTER_FROM):
        fits = [a for v, p, a, d in table if (v, p, d) == (variant, pv, padded) and a <= tuple(arch)]
        if fits:
            return table[variant, pv, max(fits), padded]
    return DEFAULT_FASTER_FROM
