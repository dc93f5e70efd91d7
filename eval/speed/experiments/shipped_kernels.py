"""Kernels that were shipped compiled against the same compiled here: same bits, same speed, beside any Triton or none?

    python -m lowbit_video.eval.speed.experiments.shipped_kernels --out FOLDER [--triton FOLDER ...] [--framework paddle]

Run on an sm_90 GPU, under Triton 3.6. Worlds, each in a process of its own, in turns: everything compiled here; only what was
shipped; only what was shipped, where `import triton` fails; and for each --triton (a folder on PYTHONPATH that holds another
version) what "auto" does there, and everything compiled there. In every world the same calls are made, of attention by every
shipped kernel and of every exchange kernel, and their outputs hashed; then whole calls are timed. Writes shipped_kernels.json:
what differs from the first world, what no call of the second launched, and the times. Exit status 1 where bits differ, or a
shipped kernel was not launched.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_video.kernels.shipped.store import builds

SHAPES = ((2, 17776, 30, 64), (1, 32768, 24, 128))
"""Timed, (batch, tokens, heads, head dim)."""
HOST_SHAPE = (1, 256, 4, 64)
CALLS = (("int8+fp8", "hopper"), ("int8+fp16", "hopper"), ("fp8+fp8", "hopper"), ("int8+fp8", "triton"),
         ("int8+fp16", "triton"), ("exact", "triton"))
DTYPES = ("float16", "bfloat16")
MOST_DRAWN = 1_000_003
"""Values drawn; a larger tensor repeats them. A prime, so that no two rows are alike."""
TOKENS = 1000
KEPT = 512
"""Values kept of each result of a call with odd memory, to compare by number."""
ROUNDING = {"statistics": 1e-5, "attention": 1e-3}
"""What two orders of a sum may make of it, mean difference over mean magnitude; a mean that rounds otherwise moves codes."""
PAD = 20
"""Elements between rows that are no multiple of 16."""


class World:
    """One framework's tensors, the outputs of calls as hashes, and the shipped kernels that served them."""

    def __init__(self, framework: str) -> None:
        from lowbit_video.kernels.shipped import launch
        from lowbit_video.runtime import detect

        self.like = detect.anchor(framework)
        self.runtime = detect.runtime_of(self.like)
        self.hashes: dict[str, str] = {}
        self.values: dict[str, list[list[float]]] = {}
        self.served: set[str] = set()
        self.failed: list[str] = []
        find = launch.find

        def noting(described: Any) -> Any:
            build = find(described)
            if build is not None:
                self.served.add(" ".join((build.kernel, *build.constants, *build.kinds)))
            return build

        launch.find = noting

    def tensor(self, seed: int, shape: tuple[int, ...], dtype: str) -> Any:
        """Normal values (of integers: any)."""
        rng = np.random.default_rng(seed)
        count = min(MOST_DRAWN, int(np.prod(shape)))
        if dtype in ("float16", "bfloat16", "float32"):
            values = rng.standard_normal(count, dtype=np.float32)
        else:
            values = rng.integers(-100, 100, count).astype(dtype)
        return self.runtime.from_numpy(np.resize(values, shape), self.like, dtype)

    def note(self, name: str, *results: Any) -> None:
        data = b"".join(np.ascontiguousarray(self.runtime.to_numpy(one)).tobytes() for one in results)
        self.hashes[name] = hashlib.sha256(data).hexdigest()
        if name.startswith("statistics") or "odd" in name:  # code for odd memory sums in another order
            flat = [np.asarray(self.runtime.to_numpy(one), np.float64).ravel() for one in results]
            self.values[name] = [one[:: max(1, one.size // KEPT)].tolist() for one in flat]


def attention_calls(world: World) -> None:
    """Every Hopper build, and the quantisers of tidy and of odd tensors; twice each, launched and repeated."""
    import lowbit_video

    options = product(("int8+fp8", "int8+fp16", "fp8+fp8"), (64, 128), DTYPES, (False, True), ("", "lse", "shifted"))
    for spec, head_dim, dtype, causal, lse in options:
        precision = lowbit_video.Precision(spec, smooth_k=lse != "lse")
        for group, odd in ((2, False), *(((1, True), (1, False), (4, False), (8, False)) if not causal else ())):
            row = head_dim + (PAD if odd else 0)
            q, k, v = (world.tensor(seed, (2, TOKENS, heads, row), dtype)
                       for seed, heads in ((1, 8), (2, 8 // group), (3, 8 // group)))
            if odd:  # 8 bytes in, rows of 8 bytes more than a multiple of 16; V in 16 bits must be tidy for TMA
                q, k = q[..., 4:4 + head_dim], k[..., 4:4 + head_dim]
                v = v[..., 4:4 + head_dim] if spec.endswith("fp8") else world.runtime.contiguous(v[..., 4:4 + head_dim])
            for attempt in ("first", "again"):
                results = lowbit_video.attention(q, k, v, precision, is_causal=causal, return_lse=bool(lse), backend="hopper")
                world.note(f"{spec} D{head_dim} {dtype} {'causal ' * causal}{lse} group {group} {'odd ' * odd}{attempt}",
                           *(results if lse else (results,)))
    for spec, dtype in product(("int8+fp8",), DTYPES):  # smoothing alone, V's scale alone
        x = world.tensor(4, (2, TOKENS, 4, 64), dtype)
        plain = lowbit_video.Precision(spec, smooth_k=False)
        world.note(f"{spec} {dtype} unsmoothed", lowbit_video.attention(x, x, x, plain, backend="hopper"))


def statistics_calls(world: World) -> None:
    """The statistics written to addresses that are no multiples of 16, which no call of attention asks for."""
    from lowbit_video.kernels.buffers import as_buffer
    from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
    from lowbit_video.kernels.operands import Operand
    from lowbit_video.kernels.quant.shapes import partial_shape
    from lowbit_video.kernels.quant.token_stats import launch_stats

    for head_dim, dtype, names in product((64, 128), DTYPES, (("k_mean",), ("v_scale",), ("k_mean", "v_scale"))):
        x, shape = world.tensor(1, (2, TOKENS, 4, head_dim), dtype), (2, 4, TOKENS, head_dim)
        given = Operand(as_buffer(x), shape, (TOKENS * 4 * head_dim, head_dim, 4 * head_dim), FORMAT_OF_DTYPE[dtype])
        partial = world.tensor(2, (2 * int(np.prod(partial_shape(shape))) + 1,), "float32")
        made = {name: world.tensor(3, (8 * head_dim + 1,), "float32") for name in names}
        with world.runtime.launch_guard(x):
            launch_stats(as_buffer(partial).at(4, "float32"), **{name[0]: given for name in names},
                         **{name: as_buffer(one).at(4, "float32") for name, one in made.items()})
        world.note(f"statistics D{head_dim} {dtype} {names}", *made.values())


def exchange_calls(world: World) -> None:
    """Every kernel between GPUs, by its launcher."""
    from lowbit_video.kernels.buffers import as_buffer
    from lowbit_video.kernels.exchange.combine_stats import launch_combine_stats
    from lowbit_video.kernels.exchange.copy_parts import COLUMNS, launch_copy_parts, table_of
    from lowbit_video.kernels.exchange.dequant_rows import launch_dequant_rows
    from lowbit_video.kernels.exchange.layout import Copy
    from lowbit_video.kernels.exchange.merge import launch_merge
    from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
    from lowbit_video.kernels.operands import Operand, codes_of

    own = ("own", "float32")
    for head_dim, dtype, out, result, first in product((64, 128), DTYPES, own, own, (True, False)):
        shape = (2, TOKENS, 4, head_dim)
        kinds = [dtype if one == "own" else one for one in (out, result)]
        a, b, made = world.tensor(1, shape, kinds[0]), world.tensor(2, shape, dtype), world.tensor(3, shape, kinds[1])
        la, lb = (world.tensor(seed, (2, 4, TOKENS), "float32") for seed in (4, 5))
        with world.runtime.launch_guard(a):
            launch_merge(*map(as_buffer, (a, la, b, lb, made)), shape=(2, 4, TOKENS, head_dim), tokens_first=first)
        world.note(f"merge D{head_dim} {dtype} {out} {result} {first}", made, la)
    for means, count in ((1, 1), (0, 1), (1, 2)):
        gathered, weights, made = (world.tensor(seed, shape, "float32")
                                   for seed, shape in ((1, (3, count, 768)), (2, (1, 3)), (3, (count, 768))))
        with world.runtime.launch_guard(made):
            launch_combine_stats(*map(as_buffer, (gathered, weights, made)), n=768, shares=3, means=means, statistics=count)
        world.note(f"combine {means} {count}", made)
    for head_dim, dtype, odd in product((64, 128), DTYPES, (False, True)):
        memory = world.tensor(1, (8 * TOKENS * head_dim + 64,), "int8")
        scale = world.tensor(2, (8 * TOKENS,), "float32")
        made = world.tensor(3, (2, 4, TOKENS, head_dim), dtype)
        x = Operand(as_buffer(made), (2, 4, TOKENS, head_dim), (4 * TOKENS * head_dim, TOKENS * head_dim, head_dim),
                    FORMAT_OF_DTYPE[dtype])
        codes = codes_of(x, "int8", as_buffer(memory).at(1 if odd else 0, "int8"), as_buffer(scale), None)
        with world.runtime.launch_guard(made):
            launch_dequant_rows(codes._replace(scale_strides=(4 * TOKENS, TOKENS)), x)
        world.note(f"dequantise D{head_dim} {dtype} {odd}", made)
    for columns, short in product(COLUMNS, (0, 1)):
        width = 4 * (3 * columns - short)
        rows = 3 * 4096 // columns - 1
        table = table_of([Copy(0, 0, 0, width, 0, 0, 0, width, rows, width)])
        source, made = (world.tensor(seed, (rows * width // 4,), "int32") for seed in (1, 2))
        held = world.runtime.from_numpy(np.array(table, np.int64), world.like, "int64")
        with world.runtime.launch_guard(made):
            launch_copy_parts(*map(as_buffer, (source, source, made, held)), table, batch=1, heads=1)
        world.note(f"copy {columns} {short}", made)


def serving(world: World) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """What is timed and can be served here: its name, its shape, the call."""
    import lowbit_video
    from lowbit_video.errors import UnsupportedError

    for shape in (*SHAPES, HOST_SHAPE):
        q, k, v = (world.tensor(seed, shape, "float16") for seed in (1, 2, 3))
        for precision, backend in CALLS:
            call = lambda q=q, k=k, v=v, precision=precision, backend=backend: lowbit_video.attention(q, k, v, precision,
                                                                                                      backend=backend)
            try:
                call()
            except UnsupportedError:
                continue
            except Exception as error:  # what another Triton cannot compile must not end its world
                print(f"{precision} {backend} {shape}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
                world.failed.append(f"{precision} {backend} {shape}: {type(error).__name__}")
                continue
            yield f"{precision} {backend}", shape, call


def times(world: World) -> dict[str, dict[str, float]]:
    """GPU milliseconds and TFLOP/s of whole calls at SHAPES, quantisation counted; host microseconds at HOST_SHAPE."""
    from lowbit_video.eval.speed import timing

    timer, found = timing.Timer(world.runtime, world.like), {}
    for name, shape, call in serving(world):
        if shape == HOST_SHAPE:
            found[f"{name} {shape}"] = dict(host_us=statistics.median(timer.host_us(call, 400) for _ in range(3)))
            continue
        taken = timing.time_together(timer, {name: call}, budget_ms=300)[name]
        batch, tokens, heads, head_dim = shape
        flops = 4 * batch * heads * tokens**2 * head_dim
        found[f"{name} {shape}"] = dict(ms=taken.median_ms, tflops=round(flops / taken.median_ms / 1e9, 1))
    return found


def worker(framework: str, hashes: bool) -> dict[str, Any]:
    """All of one world."""
    from lowbit_video.kernels.shipped.choice import chosen, triton_version

    from .. import bench

    warnings.simplefilter("ignore")
    world = World(framework)
    if hashes:
        attention_calls(world)
        statistics_calls(world)
        exchange_calls(world)
    return dict(about=bench.environment(framework), triton=triton_version(), choice=chosen().why, hashes=world.hashes,
                values=world.values, served=sorted(world.served), times=times(world), failed=world.failed)


def precompile(number: int) -> None:
    """Compiles a shipped kernel as a launch would, into Triton's cache, so that the first world need not wait for each."""
    from lowbit_video.kernels.shipped.cases import samples
    from lowbit_video.kernels.shipped.choice import ARCH
    from lowbit_video.kernels.shipped.offline import offline

    one = samples()[number]
    with offline(ARCH):
        one.kernel.run(*one.arguments, grid=one.grid, warmup=True, enable_fp_fusion=True, **one.constants)


def run_world(name: str, choice: str, folder: str | None, blocked: bool, args: argparse.Namespace, hashes: bool
              ) -> dict[str, Any]:
    """A worker's word, or its last words."""
    env = dict(os.environ, LOWBIT_VIDEO_KERNELS=choice)
    if folder:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, env.get("PYTHONPATH"))))
    code = "import sys\n" + "sys.modules['triton'] = None\n" * blocked + (
        "import json\nfrom lowbit_video.eval.speed.experiments import shipped_kernels\n"
        f"print('\\n' + json.dumps(shipped_kernels.worker({args.framework!r}, {hashes})))")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode:
        print(f"{name}: failed\n{done.stderr[-3000:]}", flush=True)
        return dict(error=done.stderr[-3000:], hashes={}, served=[], times={})
    return json.loads(done.stdout.splitlines()[-1])


def same_but_for_rounding(case: str, wanted: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a call's results differ by no more than two orders of a sum may make them."""
    if case not in wanted or case not in given:
        return False
    limit = ROUNDING["statistics" if case.startswith("statistics") else "attention"]
    pairs = [(np.array(a), np.array(b)) for a, b in zip(wanted[case], given[case])]
    return all(np.isfinite(a).all() and np.abs(a - b).mean() <= limit * np.abs(a).mean() for a, b in pairs)


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the record says of all worlds; the first is what the others are held against."""
    first = next(iter(found.values()))[0]["hashes"]
    values = next(iter(found.values()))[0].get("values", {})
    other = {name: [case for case, one in first.items() if rounds[0]["hashes"].get(case) != one]
             for name, rounds in found.items()}
    rounded = {name: [case for case in cases if same_but_for_rounding(case, values, found[name][0].get("values", {}))]
               for name, cases in other.items()}
    differ = {name: [case for case in cases if case not in rounded[name]] for name, cases in other.items()}
    every = {" ".join((one.kernel, *one.constants, *one.kinds)) for one in builds()}
    medians = {}
    for name, rounds in found.items():
        keys = {key: unit for one in rounds for key, values in one["times"].items() for unit in values}
        medians[name] = {key: {unit: statistics.median(one["times"][key][unit] for one in rounds if key in one["times"])
                               for unit in ("tflops", "host_us") if unit == keys[key]} for key in keys}
    told = lambda one: {key: value for key, value in one.items() if key not in ("about", "hashes", "served", "values")}
    return dict(about=next(iter(found.values()))[0].get("about"), cases=len(first), differ=differ,
                equal_but_for_rounding=rounded, not_launched=sorted(every - set(found["shipped"][0]["served"])),
                errors={name: one["error"] for name, rounds in found.items() for one in rounds if "error" in one},
                medians=medians, rounds={name: [told(one) for one in rounds] for name, rounds in found.items()})


def main() -> int:
    """Runs the worlds in turns, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for shipped_kernels.json")
    parser.add_argument("--triton", action="append", default=[], help="a folder that holds another version of Triton")
    parser.add_argument("--framework", default="torch", choices=("torch", "paddle"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds for one world")
    args = parser.parse_args()
    worlds = [("compiled", "compiled", None, False), ("shipped", "shipped", None, False), ("no triton", "auto", None, True)]
    for folder in args.triton:
        version = Path(folder).name
        worlds += [(f"auto beside {version}", "auto", folder, False), (f"compiled by {version}", "compiled", folder, False)]
    found: dict[str, list[dict[str, Any]]] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(precompile, range(len(builds()))))
    for turn in range(args.rounds):
        for name, choice, folder, blocked in worlds:
            hashes = turn == 0 and not name.startswith("compiled by")
            found.setdefault(name, []).append(run_world(name, choice, folder, blocked, args, hashes))
            print(f"round {turn + 1}: {name}", flush=True)
            record = compare(found) if "shipped" in found else {}
            (args.out / "shipped_kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, values in record["medians"].items():
        print(name, *(f"\n  {key}: {value}" for key, value in values.items()))
    differ = {name: len(cases) for name, cases in record["differ"].items() if cases and not name.startswith("compiled by")}
    rounded = {name: len(cases) for name, cases in record["equal_but_for_rounding"].items() if cases}
    print(f"equal but for rounding, of odd memory: {rounded or 'none'}")
    print(f"{record['cases']} outputs; differ from what is compiled here: {differ or 'none'}; shipped kernels that no call "
          f"launched: {len(record['not_launched'])}; worlds that failed: {list(record['errors']) or 'none'}")
    return 1 if differ or record["not_launched"] or record["errors"] or not record["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())
