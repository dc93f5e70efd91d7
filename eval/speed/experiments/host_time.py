"""What a warm call costs the host, through Triton's own launcher and from a plan, and whether both give the same bits.

    python -m lowbit_video.eval.speed.experiments.host_time --out FILE.json [--triton FOLDER ...] [--framework paddle]

Run on a GPU. Under the Triton at hand, and under each that a --triton folder holds (as on PYTHONPATH), every call is made with
LOWBIT_VIDEO_PLANS=0 and then from its plan, on tensors that the plan was not made with, and compared to the bit: short and odd
calls of every kind, in a process for each of LOWBIT_VIDEO_KERNELS "auto" and "compiled". Then host microseconds a call of
HOST_SHAPE, in turns. Exit status 1 where bits differ, a call from a plan launched through Triton, or a call failed.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HOST_SHAPE = (1, 256, 4, 64)
"""(batch, tokens, heads, head dim): its kernels take the GPU less than a call takes the host."""
CALLS = (("int8+fp8", "triton"), ("int8+fp16", "triton"), ("int4+fp16", "triton"), ("int8/int2+fp8", "triton"),
         ("fp8+fp8", "triton"), ("exact", "triton"), ("int8+fp8", "hopper"))
OPTIONS = (((1, 256, 4, 64), "float16", {}), ((2, 333, 6, 64), "bfloat16", dict(return_lse=True, is_causal=True)),
           ((1, 1000, 4, 128), "float16", dict(scale=0.2)), ((2, 17776, 2, 64), "float16", {}),
           ((1, 300, 4, 64), "float32", {}))
"""Shape, dtype and options of what is compared; the first so small that an old driver's maps are mended."""
ODD = ("int8+fp8", "exact")
"""Precisions that are compared on odd memory too."""
PAD = 4
"""Elements between rows of memory that is no multiple of 16 bytes."""
GROUPS, CALLS_A_GROUP, SETTLE = 60, 20, 10
"""Groups timed, calls of each, and groups that do not count."""
ROUNDS = 3
OFF = "LOWBIT_VIDEO_PLANS"


@contextlib.contextmanager
def launching(plans: bool) -> Iterator[None]:
    """Inside, calls are made from plans or through their launchers."""
    before = os.environ.pop(OFF, None)
    if not plans:
        os.environ[OFF] = "0"
    try:
        yield
    finally:
        os.environ.pop(OFF, None)
        if before is not None:
            os.environ[OFF] = before


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Collects the names of what Triton launches inside."""
    from triton.runtime.jit import JITFunction

    names, run = [], JITFunction.run

    def counting(kernel: Any, *args: Any, **more: Any) -> Any:
        names.append(kernel.fn.__name__)
        return run(kernel, *args, **more)

    JITFunction.run = counting
    try:
        yield names
    finally:
        JITFunction.run = run


class World:
    """Tensors of one framework on its GPU."""

    def __init__(self, framework: str) -> None:
        from lowbit_video.runtime import detect

        self.like = detect.anchor(framework)
        self.runtime = detect.runtime_of(self.like)

    def tensors(self, seed: int, shape: tuple[int, ...], dtype: str, odd: bool = False) -> list[Any]:
        """q, k and v of normal values; odd: neither they nor their rows begin at multiples of 16 bytes."""
        rng = np.random.default_rng(seed)
        wide = (*shape[:-1], shape[-1] + (PAD if odd else 0))
        made = [self.runtime.from_numpy(rng.standard_normal(wide, np.float32), self.like, dtype) for _ in range(3)]
        return [t[..., PAD:] for t in made] if odd else made

    def bits(self, results: Any) -> list[np.ndarray]:
        results = results if isinstance(results, tuple) else (results,)
        return [np.ascontiguousarray(self.runtime.to_numpy(one)) for one in results]

    def cases(self) -> Iterator[tuple[str, Callable[[list[Any]], Any], tuple[list[Any], list[Any]]]]:
        """Its name, a call of q, k and v, and two sets of these."""
        import lowbit_video

        for precision, backend in CALLS:
            for shape, dtype, more in OPTIONS:
                if backend == "hopper" and dtype == "float32":
                    continue
                for odd in (False, True) if backend == "triton" and precision in ODD else (False,):
                    sets = tuple(self.tensors(seed, shape, dtype, odd) for seed in (1, 2))
                    yield (f"{precision} {backend} {shape} {dtype} {more}{' odd' * odd}",
                           lambda qkv, p=precision, b=backend, m=more: lowbit_video.attention(*qkv, p, backend=b, **m), sets)
        cu = self.runtime.from_numpy(np.array([0, 100, 256], np.int32), self.like, "int32")
        sets = tuple([t[0] for t in self.tensors(seed, HOST_SHAPE, "float16")] for seed in (1, 2))
        yield "varlen int8+fp8", lambda qkv: lowbit_video.attention_varlen(*qkv, cu, cu, 156, 156, "int8+fp8"), sets
        sets = tuple(self.tensors(seed, (2, 1000, 4, 64), "float16") for seed in (1, 2))
        codes = lambda qkv: lowbit_video.attention_of_codes(lowbit_video.prequantize(*qkv, "int8+fp8"))
        yield "codes int8+fp8", codes, sets


def compare(world: World) -> tuple[int, list[str]]:
    """How many cases there are, and what is wrong with those where something is."""
    from lowbit_video.engine import replay

    count, wrong = 0, []
    for name, call, (first, second) in world.cases():
        count += 1
        replay.clear()
        try:
            with launching(False):
                wanted = call(second)
                kept = call(first)  # so that no memory that is used again still holds what is wanted
            with launching(True):
                made = call(first)
                with counted() as launched:
                    found = call(second)
            if launched:
                wrong.append(f"{name}: Triton launched {', '.join(launched)}; {replay.not_repeated()}")
            pairs = [*zip(world.bits(wanted), world.bits(found)), *zip(world.bits(kept), world.bits(made))]
            if not all(a.tobytes() == b.tobytes() and np.isfinite(a).all() for a, b in pairs):
                wrong.append(f"{name}: other bits, or no number")
        except Exception as error:  # what one Triton cannot compile must not end its world
            wrong.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return count, wrong


def host_us(world: World, call: Callable[[], Any]) -> float:
    """Median over groups of warm calls."""
    from lowbit_video.runtime import cuda_driver

    times = []
    for _ in range(GROUPS):
        cuda_driver.synchronize(world.runtime.stream(world.like))
        begin = time.perf_counter()
        for _ in range(CALLS_A_GROUP):
            call()
        times.append((time.perf_counter() - begin) / CALLS_A_GROUP * 1e6)
    return statistics.median(times[SETTLE:])


def times(world: World) -> dict[str, dict[str, list[float]]]:
    """Host microseconds of each call of HOST_SHAPE, by launcher and by plan, a round each."""
    import lowbit_video

    q, k, v = world.tensors(3, HOST_SHAPE, "float16")
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(ROUNDS):
        for precision, backend in CALLS:
            for plans in (False, True) if turn % 2 == 0 else (True, False):
                with launching(plans), contextlib.suppress(Exception):  # `compare` tells what failed
                    taken = host_us(world, lambda p=precision, b=backend: lowbit_video.attention(q, k, v, p, backend=b))
                    sides = found.setdefault(f"{precision} {backend}", dict(launcher=[], plan=[]))
                    sides["plan" if plans else "launcher"].append(round(taken, 1))
    return found


def worker(framework: str) -> dict[str, Any]:
    """All of one world."""
    from lowbit_video.kernels.shipped.choice import chosen, triton_version

    from .. import bench

    warnings.simplefilter("ignore")
    world = World(framework)
    count, wrong = compare(world)
    return dict(about=bench.environment(framework), triton=triton_version(), choice=chosen().why, cases=count, wrong=wrong,
                host_us=times(world))


def run_world(framework: str, choice: str, folder: str | None, timeout: float) -> dict[str, Any]:
    """A worker's word, or its last words."""
    paths = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    code = ("import json; from lowbit_video.eval.speed.experiments import host_time; "
            f"print('\\n' + json.dumps(host_time.worker({framework!r})))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout,
                          env=dict(os.environ, LOWBIT_VIDEO_KERNELS=choice, PYTHONPATH=paths))
    if done.returncode:
        return dict(cases=0, wrong=[done.stderr[-2000:]], host_us={})
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Runs the worlds, prints, writes; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--triton", action="append", default=[], help="a folder that holds another version of Triton")
    parser.add_argument("--framework", default="torch", choices=("torch", "paddle"))
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds for one world")
    args = parser.parse_args()
    found = {}
    for folder in (None, *args.triton):
        for choice in ("auto", "compiled"):
            one = run_world(args.framework, choice, folder, args.timeout)
            name = f"Triton {one.get('triton') or folder or 'at hand'}, {choice}"
            found[name] = one
            print(f"{name}: {one['cases']} cases, {len(one['wrong'])} of them wrong", *one["wrong"], sep="\n  ", flush=True)
            for call, sides in one["host_us"].items():
                told = {side: f"{statistics.median(values):.1f}" if values else "no" for side, values in sides.items()}
                print(f"  {call}: {told['launcher']} us by its launcher, {told['plan']} us from a plan", flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(one["wrong"] or not one["cases"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
