"""What pooled attention loses on a trained model, and what two things that are not built would give: pools centred on the query
tile, and skipping exponentials and P.V where a tile's scores lie far under the running maximum.

    python -m lowbit_video.eval.speed.experiments.pools --model FOLDER --captures FOLDER [--out FILE.json]

Captures Q, K and V on a CPU (diffusers; `captures.py`), float32 NumPy from there on. Pools centred on the query tile stand for
a key tile by K' and V', means weighted by the softmax that the query tile's mean gives its keys, and by their log-sum-exp:
exact for the mean. Choices are those of `kernels/pooled/reference.py`, tiles those of the Hopper kernel. Exits with 1 where
pooled attention as computed here is not what the reference gives.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowbit_video.kernels.formats import LOG2_E
from lowbit_video.kernels.pooled import reference
from lowbit_video.kernels.pooled.tiles import KEY_TILE, query_tile
from lowbit_video.token_order import token_order

from .captures import Capture, captures, load

KEEPS = (0.1, 0.2, 0.3, 0.5)
QUARTERS = 4
"""Pools of a key tile in the method "quarters"."""
METHODS = ("dropped", "pools", "quarters", "centred", "centred, own choice")
THRESHOLDS = (8, 12, 24)
"""A tile is skipped where all its scores are under 2**-so many of the running maximum."""
CONSUMER = 64
"""Rows of a Hopper warpgroup, which could skip a tile alone."""
SAME = 1e-4
"""Relative L1 that pooled attention as computed here may have to the reference's."""


class Pools(NamedTuple):
    """What stands for key tiles: scores [R, P] of a query tile's rows (natural log, weight counted), values [P, D]."""

    scores: np.ndarray
    values: np.ndarray


class Rows:
    """One query tile's exact attention, by key tiles: q [R, D] to k, v [N, D]. top, mass: [R, T], each tile's largest score and
    its sum of exponentials under that; sums: [R, T, D], of its values."""

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        tokens, head_dim = k.shape
        tiles = -(-tokens // KEY_TILE)
        s = np.full((len(q), tiles * KEY_TILE), -np.inf, np.float32)
        s[:, :tokens] = q @ k.T * np.float32(head_dim**-0.5)
        s = s.reshape(len(q), tiles, KEY_TILE)
        self.top = s.max(-1)
        p = np.exp(s - self.top[..., None])
        padded = np.zeros((tiles * KEY_TILE, head_dim), np.float32)
        padded[:tokens] = v
        self.mass = p.sum(-1)
        self.sums = (p.swapaxes(0, 1) @ padded.reshape(tiles, KEY_TILE, head_dim)).swapaxes(0, 1)

    def attend(self, taken: np.ndarray, pools: Pools | None = None) -> np.ndarray:
        """Attention [R, D] to the tiles taken ([T] or [R, T]), and to pools."""
        top = np.where(taken, self.top, -np.inf)
        most = top.max(1) if pools is None else np.maximum(top.max(1), pools.scores.max(1, initial=-np.inf))
        weight = np.exp(top - most[:, None])
        total, out = (weight * self.mass).sum(1), np.einsum("rt,rtd->rd", weight, self.sums)
        if pools is not None:
            p = np.exp(pools.scores - most[:, None])
            total, out = total + p.sum(1), out + p @ pools.values
        return out / total[:, None]

    def skipped(self, bits: int, rows: int, final: bool = False) -> np.ndarray:
        """[R, T]: tiles of which all scores of a group of rows lie so many bits under the maximum of the tiles before, from the
        last tile to the first; final: under that of all tiles."""
        seen = np.maximum.accumulate(self.top[:, ::-1], axis=1)[:, ::-1]
        short = (seen[:, :1] if final else seen) - self.top
        groups = [short[i:i + rows].min(0, keepdims=True).repeat(len(short[i:i + rows]), 0) for i in range(0, len(short), rows)]
        return np.concatenate(groups) * LOG2_E > bits


class Tiles:
    """A head's key tiles, k, v [N, D]: what plain pools of whole tiles and of quarters are made of."""

    def __init__(self, k: np.ndarray, v: np.ndarray) -> None:
        self.k, self.v, self.scale = k, v, np.float32(k.shape[1]**-0.5)
        self.starts = np.arange(0, len(k), KEY_TILE)
        self.parts = np.arange(0, len(k), KEY_TILE // QUARTERS)

    def plain(self, q: np.ndarray, pooled: np.ndarray, starts: np.ndarray) -> Pools:
        """Pools of runs of keys that begin at `starts`, of the tiles pooled [T]: each the mean of its keys and values."""
        lengths = np.diff(np.append(starts, len(self.k))).astype(np.float32)
        keys, values = (np.add.reduceat(x, starts) / lengths[:, None] for x in (self.k, self.v))
        mine = pooled[starts // KEY_TILE]
        return Pools(q @ keys[mine].T * self.scale + np.log(lengths[mine]), values[mine])

    def centred(self, q: np.ndarray) -> tuple[Pools, np.ndarray]:
        """Pools of all tiles, centred on q's mean, and their log-sum-exp [T] for it."""
        mean = q.mean(0)
        s = self.k @ mean * self.scale
        top = np.maximum.reduceat(s, self.starts)
        spread = np.repeat(top, np.diff(np.append(self.starts, len(s))))
        p = np.exp(s - spread)
        mass = np.add.reduceat(p, self.starts)
        keys, values = (np.add.reduceat(p[:, None] * x, self.starts) / mass[:, None] for x in (self.k, self.v))
        lse = top + np.log(mass)
        return Pools((q - mean) @ keys.T * self.scale + lse, values), lse


def own_choice(q: np.ndarray, lse: np.ndarray, stats: reference.TileStats) -> np.ndarray:
    """Scores [T] of key tiles for centred pools: a tile's weight is its log-sum-exp, and what its pool cannot follow is how far
    rows lie from their mean. stats: of one head."""
    spread = np.maximum(stats.k_var[0, 0] @ q.var(0), 1e-30)
    return (lse * LOG2_E + 0.5 * np.log2(spread) + np.log2(np.maximum(stats.v_spread[0, 0], 1e-30))).astype(np.float32)


def ordered(capture: Capture, order: str) -> Capture:
    """The same with its video tokens in another order."""
    places = np.concatenate([np.arange(capture.text), capture.text + token_order(order, *capture.grid)])
    return capture._replace(**{name: getattr(capture, name)[:, places] for name in "qkv"})


def measure(capture: Capture, every: int) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """(what: head, query tile, size of the exact output; what was found) for every `every`-th query tile that chooses."""
    heads, tokens, head_dim = capture.q.shape
    rows = query_tile(head_dim)
    for head in range(heads):
        q, k, v = (x[head] for x in (capture.q, capture.k, capture.v))
        tiles = Tiles(k, v)
        stats = reference.tile_stats(k[None, None], v[None, None], None)
        scores = reference.error_scores(q[None, None], stats, head_dim**-0.5)
        chosen = {keep: reference.choose(scores, [keep], capture.text, head_dim)[0, 0] for keep in KEEPS}
        for i_m in range(-(-capture.text // rows), -(-tokens // rows), every):
            mine = q[i_m * rows:(i_m + 1) * rows]
            some, (centred, lse) = Rows(mine, k, v), tiles.centred(mine)
            own = np.repeat(own_choice(mine, lse, stats)[None, None, None], scores.shape[2], axis=2)
            taken = {keep: (chosen[keep][i_m], reference.choose(own, [keep], capture.text, head_dim)[0, 0, i_m])
                     for keep in KEEPS}
            exact = some.attend(np.ones(len(tiles.starts), bool))
            size = np.abs(exact).sum()
            outs = {**pooled_outputs(some, mine, tiles, centred, taken), **skipping_outputs(some, rows)}
            yield dict(head=head, tile=i_m, size=float(size)), {
                **{key: float(np.abs(out - exact).sum() / size) for key, out in outs.items()},
                **{("kept", keep): float(which.mean()) for keep, (which, _) in taken.items()},
                **{("skipped", *how): float(some.skipped(*what).mean()) for how, what in skips(rows).items()}}


def pooled_outputs(some: Rows, q: np.ndarray, tiles: Tiles, centred: Pools, taken: dict[float, tuple]
                   ) -> dict[tuple, np.ndarray]:
    """(method, kept share) -> [R, D]. taken: kept share -> the tiles chosen for plain pools, and for centred ones; [T] each."""
    outs: dict[tuple, np.ndarray] = {}
    for keep, (which, own) in taken.items():
        of = lambda which: Pools(centred.scores[:, ~which], centred.values[~which])
        by = (some.attend(which), some.attend(which, tiles.plain(q, ~which, tiles.starts)),
              some.attend(which, tiles.plain(q, ~which, tiles.parts)), some.attend(which, of(which)), some.attend(own, of(own)))
        outs |= {(method, keep): out for method, out in zip(METHODS, by)}
    return outs


def skips(rows: int) -> dict[tuple, tuple]:
    """(who skips, threshold) -> what `Rows.skipped` takes. rows: of a query tile."""
    who = {"tile": (rows, False), "consumer": (CONSUMER, False), "consumer, best": (CONSUMER, True)}
    return {(name, bits): (bits, *how) for name, how in who.items() for bits in THRESHOLDS}


def skipping_outputs(some: Rows, rows: int) -> dict[tuple, np.ndarray]:
    """("skip error", who skips, threshold) -> [R, D]."""
    return {("skip error", *how): some.attend(~some.skipped(*what)) for how, what in skips(rows).items()}


def unlike_reference(capture: Capture, keep: float = 0.3) -> float:
    """Relative L1 between the last query tile's pooled attention here and by the reference, of head 0."""
    q, k, v = (x[:1] for x in (capture.q, capture.k, capture.v))
    head_dim = q.shape[-1]
    stats = reference.tile_stats(k[None], v[None], None)
    chosen = reference.choose(reference.error_scores(q[None], stats, head_dim**-0.5), [keep], capture.text, head_dim)
    mine = slice((chosen.shape[2] - 1) * query_tile(head_dim), None)
    out, lse = (x[0, 0, mine] for x in reference.pooled_part(q[None], stats, chosen, head_dim**-0.5))
    taken = chosen[0, 0, -1]
    keys = taken.repeat(KEY_TILE)[:k.shape[1]]
    s = q[0, mine] @ k[0, keys].T * head_dim**-0.5
    both = np.concatenate([s, lse[:, None]], 1)
    p = np.exp(both - both.max(1, keepdims=True))
    wanted = (p[:, :-1] @ v[0, keys] + p[:, -1:] * out) / p.sum(1, keepdims=True)
    tiles = Tiles(k[0], v[0])
    ours = Rows(q[0, mine], k[0], v[0]).attend(taken, tiles.plain(q[0, mine], ~taken, tiles.starts))
    return float(np.abs(ours - wanted).sum() / np.abs(wanted).sum())


def summary(rows: Sequence[tuple[dict[str, Any], dict[Any, float]]]) -> dict[str, Any]:
    """Of many query tiles: errors by method and kept share (mean: over heads of captures, of all its outputs; worst: of query
    tiles) and shares of tiles that are skipped."""
    groups: dict[Any, list[int]] = {}
    for number, (where, _) in enumerate(rows):
        groups.setdefault((where["capture"], where["head"]), []).append(number)
    size = np.array([where["size"] for where, _ in rows])
    of = lambda key: np.array([found[key] for _, found in rows])
    mean = lambda key: float(np.mean([np.average(of(key)[some], weights=size[some]) for some in groups.values()]))
    table = {method: {keep: dict(mean=round(mean((method, keep)), 5), worst=round(float(of((method, keep)).max()), 4))
                      for keep in KEEPS} for method in METHODS}
    skipping = {name: {bits: dict(share=round(float(of(("skipped", name, bits)).mean()), 4),
                                  error=round(mean(("skip error", name, bits)), 6)) for bits in THRESHOLDS}
                for name in dict.fromkeys(name for name, _ in skips(0))}
    return dict(query_tiles=len(rows), kept={keep: round(float(of(("kept", keep)).mean()), 4) for keep in KEEPS}, errors=table,
                skipped=skipping)


def over_pools(errors: Sequence[dict[str, dict[float, float]]]) -> dict[str, dict[float, dict[str, float]]]:
    """How other methods stand to plain pools at a kept share. errors: of each capture, by method and kept share.

    error: theirs over that of plain pools, the geometric mean over captures; least, most: of captures. kept: the share at which
    they err as plain pools do, by straight lines between logarithms of errors, the mean over captures.
    """
    found: dict[str, dict[float, dict[str, float]]] = {}
    for method in METHODS[2:]:
        for i, keep in enumerate(KEEPS[1:], 1):
            logs = [[np.log([of[name][share] for share in KEEPS]) for name in ("pools", method)] for of in errors]
            ratios = np.array([other[i] - plain[i] for plain, other in logs])
            kept = [np.interp(-plain[i], -other, KEEPS) for plain, other in logs]
            found.setdefault(method, {})[keep] = dict(
                error=round(float(np.exp(ratios.mean())), 3), least=round(float(np.exp(ratios.min())), 3),
                most=round(float(np.exp(ratios.max())), 3), kept=round(float(np.mean(kept)), 3))
    return found


def main() -> int:
    """Captures, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--model", required=True, help="a folder that diffusers reads, with a generation.json")
    parser.add_argument("--captures", type=Path, required=True, help="folder of captures; kept, and used again")
    parser.add_argument("--layers", type=numbers, default=[0, 3, 6])
    parser.add_argument("--steps", type=numbers, default=[2, 12, 22])
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--every", type=int, default=4, help="one query tile in so many")
    parser.add_argument("--orders", default="raster,hilbert")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin = time.perf_counter()
    files = captures(args.model, args.captures, args.layers, args.steps, args.clips)
    asked = {name: getattr(args, name) for name in ("layers", "steps", "clips", "every")}
    off, report = 0.0, dict(asked=asked, orders={}, by_capture=[])
    for order in args.orders.split(","):
        rows: list[tuple[dict[str, Any], dict[Any, float]]] = []
        for file in files:
            capture = ordered(load(file), order)
            off = max(off, unlike_reference(capture))
            mine = [(dict(where, capture=file.stem), found) for where, found in measure(capture, args.every)]
            rows += mine
            some = summary(mine)
            report["by_capture"].append(dict(order=order, layer=capture.layer, step=capture.step, tokens=capture.q.shape[1],
                                             errors={method: {keep: at["mean"] for keep, at in by.items()}
                                                     for method, by in some["errors"].items()},
                                             skipped={bits: at["share"] for bits, at in some["skipped"]["consumer"].items()}))
            print(json.dumps(report["by_capture"][-1]), f"{time.perf_counter() - begin:.0f} s", flush=True)
        of_order = [some["errors"] for some in report["by_capture"] if some["order"] == order]
        report["orders"][order] = {**summary(rows), "over_pools": over_pools(of_order)}
        print(order, json.dumps(report["orders"][order], indent=1), flush=True)
    report["unlike_reference"] = off
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"against the reference: relative L1 {off:.1e}, {time.perf_counter() - begin:.0f} s")
    return 1 if off > SAME else 0


if __name__ == "__main__":
    sys.exit(main())
