"""Check builds of the exact Hopper kernel row by row, then time them beside the portable kernel and other exact attention.

    python -m lowbit_video.eval.speed.experiments.exact_hopper --out FILE.json [--seconds N] [--only NAME,NAME]
    python -m lowbit_video.eval.speed.experiments.exact_hopper --ahead     # compiles them all without a GPU, says of what size

Every build is compiled and checked in a worker process first, so that one that does not compile, is wrong or hangs costs itself
alone. The defaults are also checked at the edges of tiles, causal and not, with grouped heads, unequal lengths and an LSE.
PyTorch tensors. Exits with 1 where a default build fails.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_video.engine.gpu import Call
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.kernels.attention.hopper.build import EXACT_CONFIGS, HopperConfig
from lowbit_video.kernels.variants import VARIANTS
from lowbit_video.precision import Precision
from lowbit_video.runtime import detect

from .. import accuracy, bench, inputs, timing
from ..baselines import BASELINES
from ..shapes import Shape, parse_shapes
from . import hopper_builds

LIMITS = {"float16": (1e-3, 4e-3), "bfloat16": (6e-3, 2e-2)}
"""Largest relative L1 of all rows together, and of one row: both 16-bit roundings, of P and of the output, and some."""
LSE_LIMIT = 2e-3
SHORT = (2, 3, 1104 + 57)
"""Batch, heads and tokens that every build is checked at: ragged, several programs."""
EDGES = ((1, 1), (1, 300), (2, 128), (2, 129), (2, 130), (63, 127), (64, 128), (65, 129), (128, 128), (191, 255), (192, 256),
         (193, 257), (200, 333), (384, 150), (384, 385))
"""Lengths of Q and K at the edges of tiles of 64 to 192 rows and 64 or 128 keys, and where rows see no key."""
FIRST = ("2,30,17776,64", "1,24,32768,128")
"""Where all builds are timed, in float16; the best of them, and the default, go on."""
REST = (("2,30,17776,64", "bfloat16", 4), ("1,24,32768,128", "bfloat16", 4), ("2,48,45106,64", "float16", 3),
        ("2,48,45106,64", "bfloat16", 2), ("2,30,17776,64,causal", "float16", 3), ("1,24,32768,128,causal", "bfloat16", 3))
"""Shapes, dtype, and how many builds beside the default."""
BUDGET_MS = 150.0
OURS = "exact (triton-exact)"


def candidates() -> dict[str, tuple[int, HopperConfig]]:
    """Name -> (head dim, how to build)."""
    a = lambda **k: HopperConfig(**{**dict(block_n=128, consumers=3, stages=3, registers=160, sum_mma=False), **k})
    b = lambda **k: HopperConfig(**{**dict(block_n=128, consumers=2, stages=3, registers=240, sum_mma=False), **k})
    return {
        "64 base": (64, a()),
        "64 lazy": (64, a(lazy=True)),
        "64 lazy st2": (64, a(lazy=True, stages=2)),
        "64 lazy st4": (64, a(lazy=True, stages=4)),
        "64 lazy pin": (64, a(lazy=True, pin=True)),
        "64 turns": (64, a(turns=True)),
        "64 turns lazy": (64, a(turns=True, lazy=True)),
        "64 hold": (64, a(hold=8)),
        "64 lazy hold": (64, a(lazy=True, hold=8)),
        "64 lazy hold4": (64, a(lazy=True, hold=4)),
        "64 turns hold": (64, a(turns=True, hold=8)),
        "64 turns lazy hold": (64, a(turns=True, lazy=True, hold=8)),
        "64 turns lazy hold4": (64, a(turns=True, lazy=True, hold=4)),
        "64 lazy sums": (64, a(lazy=True, sum_mma=True)),
        "64 two lazy": (64, a(lazy=True, consumers=2, registers=240)),
        "64 bn64 lazy": (64, a(lazy=True, block_n=64, stages=6)),
        "128 base": (128, b()),
        "128 lazy": (128, b(lazy=True)),
        "128 st2": (128, b(stages=2)),
        "128 pin": (128, b(pin=True)),
        "128 lazy pin": (128, b(lazy=True, pin=True)),
        "128 turns": (128, b(turns=True)),
        "128 turns lazy": (128, b(turns=True, lazy=True)),
        "128 turns pin": (128, b(turns=True, pin=True)),
        "128 hold": (128, b(hold=8)),
        "128 hold2": (128, b(hold=2)),
        "128 lazy hold": (128, b(lazy=True, hold=8)),
        "128 lazy hold2": (128, b(lazy=True, hold=2)),
        "128 turns hold": (128, b(turns=True, hold=8)),
        "128 turns lazy hold": (128, b(turns=True, lazy=True, hold=8)),
        "128 turns lazy hold4": (128, b(turns=True, lazy=True, hold=4)),
        "128 sums": (128, b(sum_mma=True)),
        "128 bn64 lazy": (128, b(lazy=True, block_n=64, stages=6)),
        "128 three bn64 lazy": (128, b(lazy=True, consumers=3, registers=160, block_n=64, stages=5)),
    }


EDGE_CHECKS = {f"{head_dim} edges {dtype}": (head_dim, dtype) for head_dim in EXACT_CONFIGS for dtype in LIMITS}
"""Checks of the default builds, by name."""


def off_by(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Relative L1 of all rows [.., D] together and the largest of a row; NaN counts as infinitely wrong, so does a row that
    should be zero and is not."""
    error, size = np.abs(got.astype(np.float64) - wanted).sum(-1), np.abs(wanted).sum(-1, dtype=np.float64)
    error = np.where(np.isnan(error), np.inf, error)
    worst = np.where(size > 0, error / np.where(size > 0, size, 1), np.where(error > 0, np.inf, 0.0)).max()
    return float(error.sum() / max(size.sum(), 1e-30)), float(worst)


def call_of(runtime: Any, q: Any, k: Any, v: Any, causal: bool, lse: bool, config: HopperConfig | None) -> Call:
    """A call of the exact Hopper kernel on [B, H, N, D] tensors, whose output holds NaN."""
    variant = next(one for one in VARIANTS if one.name == "hopper-exact")
    options = AttentionOptions(Precision("exact"), "HND", causal, runtime.shape(q)[-1] ** -0.5, lse)
    call = Call(variant, options, q, k, v, runtime=runtime, config=config)
    call.out.fill_(float("nan"))
    return call


def check_build(head_dim: int, config: HopperConfig) -> dict[str, Any]:
    """Whether a build is right at a short, ragged length, in both dtypes, every row, and gives the same bits twice."""
    like = detect.anchor("torch")
    runtime, found = detect.runtime_of(like), dict(ok=True)
    for dtype, (limit, row_limit) in LIMITS.items():
        tensors = inputs.make_inputs(runtime, (*SHORT, head_dim), dtype, like, v_offset=0.5)
        outs = []
        for _ in range(2):
            call = call_of(runtime, *tensors, False, False, config)
            outs.append(runtime.to_numpy(call.run()))
        q, k, v = (runtime.to_numpy(x).astype(np.float32) for x in tensors)
        rows = np.arange(SHORT[2])
        wanted = np.stack([[accuracy.softmax_rows(q[b, h], k[b, h], v[b, h], rows, SHORT[2], head_dim**-0.5, False)[0]
                            for h in range(SHORT[1])] for b in range(SHORT[0])])
        l1, worst = off_by(outs[0], wanted)
        found |= {dtype: (l1, worst)}
        if not (l1 <= limit and worst <= row_limit and np.array_equal(*outs)):
            found |= dict(ok=False, message="wrong" if np.array_equal(*outs) else "two runs differ")
    return found


def check_edges(head_dim: int, dtype: str, config: HopperConfig | None = None) -> dict[str, Any]:
    """The default build at EDGES, with and without a causal mask whose edge weighs most: every row and its LSE."""
    like = detect.anchor("torch")
    runtime, found = detect.runtime_of(like), dict(ok=True, cases=0, l1=0.0, worst_row=0.0, lse=0.0, wrong=[])
    limit, row_limit = LIMITS[dtype]
    for q_len, kv_len in EDGES:
        rng = np.random.default_rng(q_len + 1000 * kv_len)
        q = rng.standard_normal((2, 4, q_len, head_dim), np.float32)
        k, v = rng.standard_normal((2, 2, 2, kv_len, head_dim), np.float32)
        for hidden in (0, 1):  # the last key that each query sees and the one behind it are drawn towards it
            at = np.arange(q_len) + kv_len - q_len + hidden
            seen = (at >= 0) & (at < kv_len)
            k[:, :, at[seen]] += 0.75 * q.reshape(2, 2, 2, q_len, head_dim).sum(2)[:, :, seen]
        tensors = [runtime.from_numpy(x, like, dtype) for x in (q, k, v)]
        q, k, v = (runtime.to_numpy(x).astype(np.float32) for x in tensors)
        for causal in (False, True):
            call = call_of(runtime, *tensors, causal, True, config)
            out, lse = (runtime.to_numpy(x) for x in call.run())
            wanted, wanted_lse = map(np.stack, zip(*(
                accuracy.softmax_rows(q[b, h], k[b, h // 2], v[b, h // 2], np.arange(q_len), q_len, head_dim**-0.5, causal)
                for b in range(2) for h in range(4))))
            l1, worst = off_by(out.reshape(wanted.shape), wanted)
            lse, seen = lse.reshape(wanted_lse.shape), ~np.isneginf(wanted_lse)
            lse_off = np.abs(lse[seen] - wanted_lse[seen]).max(initial=0.0) if (np.isneginf(lse) != seen).all() else np.inf
            good = l1 <= limit and worst <= row_limit and lse_off <= LSE_LIMIT
            found |= dict(cases=found["cases"] + 1, l1=max(found["l1"], l1), worst_row=max(found["worst_row"], worst),
                          lse=max(found["lse"], float(lse_off)), ok=found["ok"] and bool(good))
            if not good:
                found["wrong"].append(dict(q_len=q_len, kv_len=kv_len, causal=causal, l1=l1, worst=worst, lse=float(lse_off)))
    return found


def check(name: str) -> dict[str, Any]:
    """The check of that name."""
    if name in EDGE_CHECKS:
        return check_edges(*EDGE_CHECKS[name])
    return check_build(*candidates()[name])


EXACT_BASELINES = [one for one in BASELINES if one.framework == "torch" and "Sage" not in one.name]


def rivals(shape: Shape, dtype: str, runtime: Any, tensors: tuple[Any, Any, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What there is to beat, by name, each yet to be made."""
    portable = next(one for one in VARIANTS if one.name == "triton-exact")
    yield OURS, lambda: bench.call_for(portable, Precision("exact"), shape, runtime, *tensors).run
    for baseline in EXACT_BASELINES:
        yield baseline.name, lambda one=baseline: one.make(*tensors, shape.causal)


def time_shape(shape: Shape, dtype: str, builds: dict[str, HopperConfig]) -> dict[str, Any]:
    """Times of the builds and of what they are compared with, all in turns; what failed, and why."""
    like = detect.anchor("torch")
    runtime = detect.runtime_of(like)
    tensors = inputs.make_inputs(runtime, shape.dims, dtype, like)
    wanted = accuracy.reference(runtime, *tensors, scale=shape.head_dim**-0.5, causal=shape.causal)
    variant = next(one for one in VARIANTS if one.name == "hopper-exact")
    made = {name: lambda config=config: bench.call_for(variant, Precision("exact"), shape, runtime, *tensors, config=config).run
            for name, config in builds.items()} | dict(rivals(shape, dtype, runtime, tensors))
    absent = {baseline.name: reason for baseline in EXACT_BASELINES if (reason := baseline.why_not()) is not None}
    calls, errors, failed = {}, {}, {}
    for name, make in made.items():
        try:
            if name in absent:
                raise LookupError(absent[name])
            call = make()
            errors[name] = accuracy.errors(runtime, call(), wanted)[0]
            if not errors[name] <= LIMITS[dtype][0]:
                raise ValueError(f"wrong: relative L1 {errors[name]:.5f}")
            calls[name] = call
        except Exception as error:  # noqa: BLE001 - the report says what failed
            failed[name] = f"{type(error).__name__}: {str(error)[-300:]}"
    times = timing.time_together(timing.Timer(runtime, tensors[0]), calls, budget_ms=BUDGET_MS)
    rows = {name: dict(ms=round(took.median_ms, 4), low=round(took.low_ms, 4), high=round(took.high_ms, 4), runs=took.runs,
                       host_us=round(took.host_us, 1), tflops=round(shape.flops / took.median_ms / 1e9, 1), l1=errors[name],
                       **(dict(config=asdict(builds[name])) if name in builds else {})) for name, took in times.items()}
    return dict(shape=str(shape), dtype=dtype, rows=rows, failed=failed)


def default_name(head_dim: int) -> str:
    return next(name for name, row in candidates().items() if row == (head_dim, EXACT_CONFIGS[head_dim]))


def best(found: dict[str, Any], head_dim: int, count: int) -> list[str]:
    """The default build and the `count` fastest others of those that were timed."""
    table = candidates()
    ranked = sorted((name for name in found["rows"] if name in table), key=lambda name: found["rows"][name]["ms"])
    default = default_name(head_dim)
    return [default] + [name for name in ranked if name != default][:count]


def told(found: dict[str, Any]) -> str:
    """A short table of one shape, the fastest first."""
    rows = found["rows"]
    flash = rows.get(BASELINES[0].name)
    lines = [f"\n{found['shape']} {found['dtype']}"]
    for name in sorted(rows, key=lambda name: rows[name]["ms"]):
        row = rows[name]
        over = f"{flash['ms'] / row['ms']:.2f}x" if flash else ""
        lines.append(f"  {name:24s} {row['ms']:9.3f} ms ({row['low']:.3f} to {row['high']:.3f}) {row['tflops']:5.0f} TFLOP/s "
                     f"{over:6s} L1 {row['l1']:.5f}")
    return "\n".join(lines + [f"  {name:24s} {reason}" for name, reason in found["failed"].items()])


def ahead() -> None:
    """Compiles every build for sm_90 without a GPU, and says of what size each is."""
    from lowbit_video.kernels.attention.hopper.launch import launch_attn_fwd
    from lowbit_video.kernels.launch import placed
    from lowbit_video.kernels.shipped import build, cases

    for name, (head_dim, config) in candidates().items():
        for dtype in LIMITS:
            collector = cases._Collector()
            q, kv = cases.operand(head_dim, dtype), cases.operand(head_dim, dtype, heads=3, number=1)
            with placed(collector):
                launch_attn_fwd(q, kv, kv, q, sm_scale=0.125, config=config)
            try:
                kernel = build.compiled(*collector.taken.values())
                print(name, dtype, build.resources(kernel.asm["cubin"]) | dict(shared=kernel.metadata.shared), flush=True)
            except Exception as error:  # noqa: BLE001 - the next ones are wanted too
                print(name, dtype, f"{type(error).__name__}: {str(error)[-200:]}", flush=True)


def main() -> int:
    """Checks, times, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("exact_hopper.json"))
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=150.0, help="after which nothing more is begun")
    parser.add_argument("--only", default="", help="builds' names, comma-separated; the default ones are always timed")
    parser.add_argument("--ahead", action="store_true", help="compile all builds without a GPU, and nothing else")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return hopper_builds.work(check) or 0
    if options.ahead:
        return ahead() or 0
    begin, table, defaults = time.perf_counter(), candidates(), [default_name(head_dim) for head_dim in EXACT_CONFIGS]
    only = set(filter(None, options.only.split(",")))
    if unknown := only - set(table):
        parser.error(f"no builds named {sorted(unknown)}; there are {list(table)}")
    names = [name for name in table if not only or name in only or name in defaults]
    report: dict[str, Any] = dict(command=" ".join(sys.argv), about=bench.environment("torch"), times=[])

    def tell(found: dict[str, Any] | None = None) -> None:
        if found is not None:
            report["times"].append(found)
            print(told(found) if "rows" in found else f"{found}", flush=True)
        report["seconds"] = round(time.perf_counter() - begin, 1)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    first = [*defaults, *EDGE_CHECKS]  # what takes longest, and what matters most
    asked = [*first, *(name for name in names if name not in first)]
    answers = hopper_builds.check_all(asked, options.workers, __spec__.name)
    report["checks"] = checks = {name: answers.get(name, dict(ok=False, message="no answer")) for name in asked}
    for name, found in checks.items():
        print(f"{'ok    ' if found['ok'] else 'FAILED'} {name}: {json.dumps({**found, 'ok': None})[:400]}", flush=True)
    tell()
    good = {name: table[name][1] for name in names if checks[name]["ok"]}
    fastest: dict[int, dict[str, Any]] = {}
    plan = [(text, "float16", None) for text in FIRST] + list(REST)
    for text, dtype, count in plan:
        [shape] = parse_shapes(text)
        if time.perf_counter() - begin > options.seconds:
            tell(dict(shape=str(shape), dtype=dtype, skipped=f"more than {options.seconds:.0f} s have passed"))
            continue
        chosen = [name for name in good if table[name][0] == shape.head_dim]
        if count is not None and shape.head_dim in fastest:
            chosen = [name for name in best(fastest[shape.head_dim], shape.head_dim, count) if name in good]
        try:
            found = time_shape(shape, dtype, {name: good[name] for name in chosen})
        except Exception as error:  # noqa: BLE001 - the other shapes are wanted too
            tell(dict(shape=str(shape), dtype=dtype, skipped=f"{type(error).__name__}: {str(error)[-300:]}"))
            continue
        if count is None:
            fastest[shape.head_dim] = found
        tell(found)
    bad = [name for name in first if not checks[name]["ok"]]
    failed = sum(not found["ok"] for found in checks.values())
    print(f"\n{len(checks)} checks, {failed} failed, of the defaults {bad or 'none'}; {report['seconds']} s; {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
