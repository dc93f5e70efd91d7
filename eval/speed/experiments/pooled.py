"""Checks pooled attention against float32 by its own lists, and times it and each of its parts beside dense attention.

    python -m lowbit_video.eval.speed.experiments.pooled [--out FILE.json] [--shapes LIST] [--seconds N]
    TRITON_INTERPRET=1 python -m lowbit_video.eval.speed.experiments.pooled --tiny     # checks on a CPU

Keys and queries change along the sequence as a video's tokens do, so that the choice matters; times depend on counts alone.
Exits with 1 where a check fails.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton
import triton.language as tl

from lowbit_video.engine import replay
from lowbit_video.engine.checks import request_of
from lowbit_video.engine.gpu import Call
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.run import run
from lowbit_video.engine.select import select
from lowbit_video.engine.workspace import layout_workspace
from lowbit_video.kernels.buffers import as_buffer
from lowbit_video.kernels.pooled import reference as pooled
from lowbit_video.kernels.pooled.part import launch_pooled_part
from lowbit_video.kernels.pooled.tiles import KEY_TILE, kept_tiles, query_tile
from lowbit_video.pooled import Pooled
from lowbit_video.runtime import detect

from ..baselines import BASELINES
from ..shapes import parse_shapes

SHAPES = "2,30,17776,64;1,24,32768,128;2,48,45106,64"
TINY = "1,1,200,64"
ALWAYS = 226
"""Tokens of text at the beginning, as CogVideoX has them."""
KEEPS = (0.5, 0.3, 0.2, 0.1)
RUN = 96
"""Tokens that share a vector."""
BLOCK = 4096
LIMITS = {"int8+fp8": 0.05, "int8+fp16": 0.02, "fp8+fp8": 0.08}
"""Largest relative L1 of the checked rows: what attention to all keys is off by on normal values, and some."""
ROW_LIMIT, LSE_LIMIT, SAME_CHOICE = 0.25, 0.05, 0.98
EVERY = 3
"""Of a query tile's rows one in so many is checked."""
PARTS = (((64, 64, 4, 2), "64x64 w4 s2"), ((64, 64, 4, 3), "64x64 w4 s3"), ((64, 128, 4, 2), "64x128 w4 s2"),
         ((64, 32, 4, 3), "64x32 w4 s3"), ((64, 128, 8, 2), "64x128 w8 s2"), ((128, 64, 8, 2), "128x64 w8 s2"),
         ((128, 128, 8, 2), "128x128 w8 s2"), ((128, 64, 4, 2), "128x64 w4 s2"))
"""Builds of the pass over pooled keys: rows, keys, warps, stages."""


@triton.jit
def smooth_kernel(out, count, seed, noise, tokens, D: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, H, N, D]: a normal vector for every RUN tokens of a head, and noise of each token's own, of a run's own size."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_token = o_x // D
    i_run = i_token // tokens * (tokens // RUN + 1) + i_token % tokens // RUN
    b_base = tl.randn(seed + 1, (i_run * D + o_x % D).to(tl.int32))
    b_size = tl.rand(seed + 2, i_run.to(tl.int32))
    b_x = b_base + noise * b_size * tl.randn(seed + (tl.program_id(0) >> 20), (o_x & 0x3FFFFFFF).to(tl.int32))
    tl.store(out + o_x, b_x.to(out.dtype.element_ty), mask=o_x < count)


class Case:
    """One shape's tensors [B, H, N, D], and the calls on them."""

    def __init__(self, shape: tuple[int, int, int, int], like: Any, dtype: str = "float16", seed: int = 1) -> None:
        self.shape, self.runtime, self.dtype = shape, detect.runtime_of(like), dtype
        count = int(np.prod(shape))
        self.tensors = [self.runtime.empty(shape, dtype, like) for _ in "qkv"]
        with self.runtime.launch_guard(like):
            for number, x in enumerate(self.tensors):
                smooth_kernel[(triton.cdiv(count, BLOCK),)](as_buffer(x), count, seed + 10 * number, 0.7, shape[2], D=shape[3],
                                                            RUN=RUN, BLOCK=BLOCK)

    def options(self, spec: str, keep: float | None, always: int = ALWAYS, backend: str = "auto") -> AttentionOptions:
        return AttentionOptions(spec, "HND", return_lse=True, backend=backend,
                                pooled=None if keep is None else Pooled(keep, min(always, self.shape[2])))

    def call(self, options: AttentionOptions) -> Call:
        variant = select(request_of(*self.tensors, options, None, self.runtime), options.backend)
        return Call(variant, options.scaled(self.shape[3]), *self.tensors, runtime=self.runtime)

    def run(self, options: AttentionOptions) -> Callable[[], Any]:
        return lambda: run(*self.tensors, options)

    def guarded(self, method: Callable[[], Any]) -> Callable[[], Any]:
        def launched() -> None:
            with self.runtime.launch_guard(self.tensors[0]):
                method()

        return launched

    def head(self, number: int, batch: int) -> list[np.ndarray]:
        """q, k, v [N, D] of one head, float32."""
        return [self.runtime.to_numpy(x[batch, number]).astype(np.float32) for x in self.tensors]

    def place(self, call: Call, name: str) -> tuple[int, str, tuple[int, ...]]:
        """Where a part of a call's workspace begins, its dtype and its shape."""
        return layout_workspace(self.shape, self.shape, call.options.precision, True, pooled=self.dtype).parts[name]

    def part(self, call: Call, name: str) -> np.ndarray:
        """A part of a call's workspace, as an array."""
        offset, dtype, shape = self.place(call, name)
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.runtime.to_numpy(call.workspace[offset:offset + count]).view(dtype).reshape(shape)


def check(case: Case, spec: str, keep: float, always: int, backend: str) -> dict[str, Any]:
    """Lists and results of one call against NumPy: three query tiles of the first and the last head, row by row."""
    options = case.options(spec, keep, always, backend)
    call = case.call(options)
    call.run()
    batch, heads, tokens, head_dim = case.shape
    rows, tiles = query_tile(head_dim), -(-tokens // KEY_TILE)
    listed, counts = case.part(call, "listed"), case.part(call, "listed_count")
    always = options.pooled.always
    forced = np.where(np.arange(counts.shape[-1]) * rows < always, tiles, min(tiles, 1 + -(-always // KEY_TILE)))
    wrong = int((counts != np.maximum(forced, kept_tiles(keep, tiles))).sum())
    errors, lse_errors, distance, same = [], [], [], []
    for i_b, i_h in {(0, 0), (batch - 1, heads - 1)}:
        q, k, v = case.head(i_h, i_b)
        chosen = np.zeros(listed.shape[2:], bool)
        for i_m, count in enumerate(counts[i_b, i_h]):
            mine = listed[i_b, i_h, i_m, :count]
            wrong += int((np.diff(mine) <= 0).any() or mine[-1] != tiles - 1 or mine[0] < 0)
            chosen[i_m, mine] = True
        one = lambda x: x[None, None]
        stats = pooled.tile_stats(one(k), one(v), None)
        wanted = pooled.choose(pooled.error_scores(one(q), stats, head_dim**-0.5), [keep], always, head_dim)[0, 0]
        same.append((chosen & wanted).sum() / wanted.sum())
        out, lse = (case.runtime.to_numpy(x[i_b, i_h]).astype(np.float32) for x in (call.out, call.lse))
        for i_m in {0, len(chosen) // 2, len(chosen) - 1}:
            mine = slice(i_m * rows, min((i_m + 1) * rows, tokens), EVERY)
            ideal, ideal_lse, exact = by_lists(q[mine], k, v, stats, chosen[i_m])
            size = np.abs(ideal).sum(-1)
            errors.append(np.abs(out[mine] - ideal).sum(-1) / size)
            lse_errors.append(np.abs(lse[mine] - ideal_lse))
            distance.append(np.abs(ideal - exact).sum() / np.abs(exact).sum())
    errors, lse_errors = np.concatenate(errors), np.concatenate(lse_errors)
    found = dict(spec=spec, keep=keep, backend=call.variant.name, always=always, wrong_lists=wrong,
                 same_choice=float(min(same)), kept=float(counts.mean() / tiles), l1=float(errors.mean()),
                 worst_row=float(errors.max()), lse=float(lse_errors.max()), pooled_to_exact=float(np.mean(distance)))
    found["good"] = bool(wrong == 0 and min(same) >= SAME_CHOICE and errors.mean() <= LIMITS[spec]
                         and errors.max() <= ROW_LIMIT and lse_errors.max() <= LSE_LIMIT)
    return found


def by_lists(q: np.ndarray, k: np.ndarray, v: np.ndarray, stats: pooled.TileStats, chosen: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled attention of q's rows by their list in float32, its LSE, and attention without pooling."""
    scale = q.shape[1] ** -0.5
    keys = chosen.repeat(KEY_TILE)[:len(k)]
    s, s_pooled = q @ k.T * scale, q @ stats.keys[0, 0].T * scale + np.log(stats.lengths)
    softmax = lambda x: np.exp(x - x.max(1, keepdims=True)) / np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)
    exact = softmax(s) @ v
    both = np.concatenate([np.where(keys, s, -np.inf), np.where(chosen, -np.inf, s_pooled)], axis=1)
    top = both.max(1)
    out = softmax(both) @ np.concatenate([v, stats.values[0, 0]])
    return out, top + np.log(np.exp(both - top[:, None]).sum(1)), exact


def check_replay(case: Case, other: Case, spec: str) -> dict[str, Any]:
    """The same bits from a first call, from its plan, and from the plan on other values as without plans."""
    options, bits = case.options(spec, 0.3), lambda x: case.runtime.to_numpy(x).tobytes()
    replay.clear()
    first = run(*case.tensors, options)
    second, elsewhere = run(*case.tensors, options), run(*other.tensors, options)
    replay.clear()
    fresh = run(*other.tensors, options)
    pairs = ((first, second), (elsewhere, fresh))
    return dict(spec=spec, good=all(bits(a[i]) == bits(b[i]) for a, b in pairs for i in (0, 1)), refused=replay.not_repeated())


def check_all_listed(case: Case, spec: str) -> dict[str, Any]:
    """Lists of every tile beside the kernel without lists; K's mean over tokens is summed in another order."""
    dense, listed = (run(*case.tensors, case.options(spec, *how))[0] for how in ((None,), (0.0, case.shape[2])))
    a, b = (case.runtime.to_numpy(x[0, 0]).astype(np.float32) for x in (dense, listed))
    off = float(np.abs(a - b).sum() / np.abs(a).sum())
    return dict(spec=spec, l1_to_dense=off, equal=bool((a == b).all()), good=off < 5e-3)


def parts_of(case: Case, keep: float) -> dict[str, Callable[[], Any]]:
    """The parts of a call, and those of dense attention, each alone."""
    from lowbit_video.kernels.pooled import choose, tile_stats

    call, dense = case.call(case.options("int8+fp8", keep)), case.call(case.options("int8+fp8", None))
    call.run()
    dense.run()
    found, shapes = call.parts.get, dict(q_shape=call.q.shape, kv_shape=call.k.shape)
    memory = case.runtime.empty(case.place(call, "scores")[2], "float32", case.tensors[0])
    scores = as_buffer(memory)
    query = lambda: tile_stats.launch_query_tiles(call.q, means=found("query_means"), squares=found("query_squares"))
    score = lambda: choose.launch_scores(
        q_means=found("query_means"), q_squares=found("query_squares"), keys=found("pooled_keys"), k_var=found("key_spreads"),
        v_spread=found("value_spreads"), scores=scores, **shapes, sm_scale=call.options.scale)
    lists = lambda: choose.launch_lists(
        scores=scores, k_scale=found("k_scale"), tiles=found("listed"), scale=found("listed_scale"),
        count=found("listed_count"), **shapes, keep=[keep] * case.shape[1], always=ALWAYS)

    def part(how: tuple[int, int, int, int] | None = None) -> None:
        launch_pooled_part(call.q, call.out_operand, keys=found("pooled_keys"), values=found("pooled_values"),
                           bias=found("scores"), part_lse=found("pooled_lse"), kv_shape=call.k.shape,
                           sm_scale=call.options.scale, how=how)

    methods = {"quantise": call.quantise, "key tiles": call._key_tiles, "query tiles": query, "scores": score, "lists": lists,
               "pooled part": part, "attend": call.attend, "dense quantise": dense.quantise, "dense attend": dense.attend}
    methods |= {f"part {name}": (lambda how=how: part(how)) for how, name in PARTS}
    kept = [memory, call, dense]
    return {name: (lambda method=method, kept=kept: case.guarded(method)()) for name, method in methods.items()}


def times(case: Case, like: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds of whole calls in turns, then of the parts."""
    from ..timing import Timer, time_together

    timer = Timer(case.runtime, like)
    calls = {"dense": case.run(case.options("int8+fp8", None)),
             "1.0": case.run(case.options("int8+fp8", 0.0, case.shape[2])),
             **{f"{keep}": case.run(case.options("int8+fp8", keep)) for keep in KEEPS}}
    flash = BASELINES[0]
    if flash.why_not() is None:
        calls[flash.name] = flash.make(*case.tensors, False)
    whole = time_together(timer, calls, budget_ms=1e3 * seconds)
    parts = time_together(timer, parts_of(case, 0.3), budget_ms=250 * seconds)
    told = lambda found: {name: round(timing.median_ms, 4) for name, timing in found.items()}
    ms = {name: timing.median_ms for name, timing in parts.items()}
    beside = sum(ms[name] for name in ("query tiles", "scores", "lists", "pooled part"))
    best = whole.get(flash.name)
    return dict(whole=told(whole), parts=told(parts), beside_to_dense=round(beside / ms["dense attend"], 4),
                over_flash={} if best is None else {name: round(best.median_ms / timing.median_ms, 3)
                                                    for name, timing in whole.items()})


def lengths(like: Any) -> Iterator[dict[str, Any]]:
    """From which length pooling pays."""
    from ..timing import Timer, time_together

    for batch, heads, head_dim in ((2, 30, 64), (1, 24, 128)):
        for tokens in (2048, 4096, 8192, 12288):
            case = Case((batch, heads, tokens, head_dim), like)
            timer = Timer(case.runtime, like)
            found = time_together(timer, {"dense": case.run(case.options("int8+fp8", None)),
                                          **{f"{keep}": case.run(case.options("int8+fp8", keep)) for keep in KEEPS}},
                                  budget_ms=100)
            yield dict(shape=case.shape, **{name: round(timing.median_ms, 4) for name, timing in found.items()})


def checks(like: Any, shape: tuple[int, int, int, int], tiny: bool) -> Iterator[dict[str, Any]]:
    """The checks of one shape, named."""
    case = Case(shape, like)
    for keep, always in ((0.3, ALWAYS), (0.1, 0))[tiny:]:
        yield dict(check="lists and rows", shape=shape, **check(case, "int8+fp8", keep, always, "triton" if tiny else "auto"))
    if not tiny:
        yield dict(check="all listed", shape=shape, **check_all_listed(case, "int8+fp8"))
        yield dict(check="replay", shape=shape, **check_replay(case, Case(shape, like, seed=5), "int8+fp8"))


def other_checks(like: Any) -> Iterator[dict[str, Any]]:
    """The other kernels that walk lists, at small shapes."""
    others = (("int8+fp8", "triton"), ("int8+fp16", "triton"), ("int8+fp16", "hopper"), ("fp8+fp8", "hopper"))
    for shape in ((1, 4, 4000, 64), (2, 3, 3000, 128)):
        for dtype in ("float16", "bfloat16"):
            case = Case(shape, like, dtype)
            for spec, backend in others:
                yield dict(check="other kernels", shape=shape, dtype=dtype, **check(case, spec, 0.3, ALWAYS, backend))


def main() -> int:
    """Checks, times, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=None, help=f"B,H,N,D;..., default {SHAPES}")
    parser.add_argument("--framework", default="torch", choices=("torch", "paddle"))
    parser.add_argument("--tiny", action="store_true", help="one small shape, checks only: for a CPU and Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the GPU for a shape's whole calls")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    like = detect.anchor(args.framework, "cpu" if args.tiny else "auto")
    shapes = [shape.dims for shape in parse_shapes(args.shapes or (TINY if args.tiny else SHAPES))]
    from ..bench import environment

    report: dict[str, Any] = dict(command=" ".join(sys.argv), about={} if args.tiny else environment(args.framework), checks=[],
                                  times=[], lengths=[])

    def tell(kind: str, found: dict[str, Any]) -> None:
        report[kind].append(found)
        print(json.dumps(found), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")

    begin = time.perf_counter()
    for shape in shapes:
        for found in checks(like, shape, args.tiny):
            tell("checks", found)
        if not args.tiny:
            tell("times", dict(shape=shape, **times(Case(shape, like), like, args.seconds)))
    for found in () if args.tiny else lengths(like):
        tell("lengths", found)
    for found in () if args.tiny else other_checks(like):
        tell("checks", found)
    bad = [found for found in report["checks"] if not found["good"]]
    print(f"{len(report['checks'])} checks, {len(bad)} failed, {time.perf_counter() - begin:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
