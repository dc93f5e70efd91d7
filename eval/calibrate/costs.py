"""What a rung costs: its measured time over that of int8+fp8, at the benchmark's shape that comes nearest; or its bits.

Of a rung with pooled keys: the share of the tiles that are kept, of what its precision costs, and what pooling itself does; it
has no bits.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit_video.files import read_json
from lowbit_video.kernels.formats import FORMATS
from lowbit_video.kernels.pooled.tiles import counted_tiles
from lowbit_video.precision import as_precision
from lowbit_video.rung import parts_of_rung

UNIT = "int8+fp8"
POOLING = 0.108
"""Of int8+fp8's time: means, choice and attention to pooled keys, however many are kept. At (2, 30, 17776, 64) on an H100 with
0.3 kept (`eval/speed/experiments/pooled.json`); 0.09 to 0.13 with 0.5 to 0.1 kept, and half of that at 45106 tokens."""
TABLE = Path(__file__).parents[1] / "speed" / "results" / "kernels.json"
"""The benchmark of this checkout; an installed package has none."""
EXACT_BITS = 16


@dataclass(frozen=True)
class Costs:
    """Costs of rungs. said: which table and shape they are of. lacking: rungs that are not in it. unit: what 1 is."""

    of: dict[str, float]
    said: str
    lacking: tuple[str, ...]
    unit: str = "times int8+fp8's time in attention"


def bits_of(rungs: Sequence[str]) -> Costs:
    """What rungs cost where bits of Q and K are counted, the mean of both; exact ones have 16, as on a GPU.

    Those with pooled keys have none: of most of their keys only means are read, in 16 bits.
    Raises ValueError for rungs of which none has any.
    """
    parts = {rung: parts_of_rung(rung) for rung in rungs}
    precisions = {rung: as_precision(precision) for rung, (precision, pooled) in parts.items()
                  if pooled is None or pooled.all_kept}
    if not precisions:
        raise ValueError(f"rungs are {', '.join(rungs)}; those with pooled keys have no bits: name others, or give a budget of "
                         "time or error")
    bits = {rung: EXACT_BITS if of.exact else (FORMATS[of.q].bits + FORMATS[of.k].bits) / 2 for rung, of in precisions.items()}
    return Costs(bits, "bits of Q and K", tuple(rung for rung in parts if rung not in bits), "bits")


def costs_of(rungs: Sequence[str], tokens: int, head_dim: int, path: Path = TABLE) -> Costs:
    """The costs of rungs by a file of `lowbit-video bench kernels`.

    Of its shapes that has int8+fp8 which comes nearest, in head dim first, then in length; of a precision its fastest kernel.
    tokens, head_dim: of the attention; the tiles that a pooled rung keeps are counted of these.
    Raises ValueError for no such file, or one without int8+fp8, and for rungs of which none has a time in that shape.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}; give the JSON of `lowbit-video bench kernels`: --speed FILE")
    held = read_json(path)
    times: dict[tuple, dict[str, float]] = {}
    for row in held.get("rows", []):
        if row["precision"] and row["total_ms"] and not row["causal"]:
            shape = times.setdefault((row["head_dim"], row["tokens"], row["batch"], row["heads"]), {})
            shape[row["precision"]] = min(row["total_ms"], shape.get(row["precision"], math.inf))
    times = {shape: of for shape, of in times.items() if UNIT in of}
    if not times:
        raise ValueError(f"{path} holds no time of {UNIT}; give the JSON of `lowbit-video bench kernels`: --speed FILE")
    far = lambda a, b: abs(math.log2(a / b))
    shape = min(times, key=lambda shape: (far(shape[0], head_dim), far(shape[1], tokens), shape))
    ratios = {}
    for rung in rungs:
        precision, pooled = parts_of_rung(rung)
        if precision in times[shape]:
            ratios[rung] = times[shape][precision] / times[shape][UNIT]
            if pooled is not None and not pooled.all_kept:
                kept, left = counted_tiles(pooled.keep, pooled.always, tokens, tokens, head_dim)
                ratios[rung] = ratios[rung] * kept / (kept + left) + POOLING
    if not ratios:
        raise ValueError(f"rungs are {', '.join(rungs)}, and none of them has a time in {path} at {shape[1]} tokens, head dim "
                         f"{shape[0]}; name some of {', '.join(times[shape])}, or give another table: --speed FILE")
    said = f"{Path(path).name} of {held.get('about', {}).get('gpu', 'an unnamed GPU')}, {shape[1]} tokens, head dim {shape[0]}"
    return Costs(ratios, said, tuple(rung for rung in rungs if rung not in ratios))
