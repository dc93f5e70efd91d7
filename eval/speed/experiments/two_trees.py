"""Times the same calls in two source trees, in turns on one GPU: did a change that should change nothing change nothing?

    python -m lowbit_video.eval.speed.experiments.two_trees --before FOLDER --after FOLDER --out FILE.json

FOLDER: where `import lowbit_video` finds the tree's package, as on PYTHONPATH. Each round runs both trees, the first in turns,
in a process of its own: GPU time of whole calls (median of CUDA events), host time of warm calls (median of groups), and a
SHA-256 of every output. Only public names are called, by PyTorch tensors or, with --framework paddle, by Paddle's.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

GPU_SHAPES = ((2, 17776, 30, 64), (1, 32768, 24, 128), (4, 8192, 32, 128))
HOST_SHAPE = (1, 256, 4, 64)
MOST_DRAWN = 1_000_003
"""Values drawn; a larger tensor repeats them. A prime, so that no two rows are alike."""
CALLS = (("int8+fp16", "hopper"), ("int8+fp16", "triton"), ("int8+fp8", "hopper"), ("int8+fp8", "triton"),
         ("int4+fp16", "triton"), ("exact", "triton"))
MORE_CALLS = (("int8/int2+fp8", "triton"), ("fp8+fp8", "hopper"), ("fp8+fp8", "triton"), ("int2+fp8", "triton"))
OUTPUT_CASES = [(*call, shape, more) for call in (*CALLS, *MORE_CALLS)
                for shape, more in (((2, 333, 6, 64), {}), ((1, 1000, 4, 128), dict(is_causal=True, return_lse=True)),
                                    ((2, 226, 4, 64), dict(return_lse=True, scale=0.2)))]


def tensors(framework: str, shape: tuple[int, ...], seed: int) -> list:
    """q, k, v of normal values [B, N, H, D], float16, on the GPU."""
    from lowbit_video.runtime import detect

    like = detect.anchor(framework)
    rng = np.random.default_rng(seed)
    values = [np.resize(rng.standard_normal(MOST_DRAWN, dtype=np.float32), shape) for _ in range(3)]
    return [detect.runtime_of(like).from_numpy(array, like, "float16") for array in values]


def outputs(framework: str) -> dict[str, str]:
    """SHA-256 of what each case gives, at its first call and at its second."""
    import lowbit_video
    from lowbit_video.runtime import detect

    runtime, found = detect.runtime_of(detect.anchor(framework)), {}
    for precision, backend, shape, more in OUTPUT_CASES:
        q, k, v = tensors(framework, shape, seed=1)
        for attempt in ("cold", "warm"):
            results = lowbit_video.attention(q, k, v, precision, backend=backend, **more)
            parts = results if more.get("return_lse") else (results,)
            data = b"".join(np.ascontiguousarray(runtime.to_numpy(part)).tobytes() for part in parts)
            found[f"{precision} {backend} {shape} {more} {attempt}"] = hashlib.sha256(data).hexdigest()
    return found


def gpu_times(framework: str) -> dict[str, float]:
    """Milliseconds of whole calls, quantisation counted."""
    import lowbit_video
    from lowbit_video.runtime import cuda_driver, detect

    found = {}
    for shape in GPU_SHAPES:
        given = tensors(framework, shape, seed=2)
        stream = detect.runtime_of(given[0]).stream(given[0])
        for precision, backend in CALLS:
            times = []
            for _ in range(13):
                begin, end = cuda_driver.Event(), cuda_driver.Event()
                begin.record(stream)
                lowbit_video.attention(*given, precision, backend=backend)
                end.record(stream)
                end.synchronize()
                times.append(begin.elapsed_ms(end))
            found[f"{precision} {backend} {shape}"] = statistics.median(times[3:])
    return found


def host_times(framework: str) -> dict[str, float]:
    """Microseconds that a warm call keeps the host."""
    import lowbit_video
    from lowbit_video.runtime import cuda_driver, detect

    q, k, v = tensors(framework, HOST_SHAPE, seed=3)
    runtime = detect.runtime_of(q)
    cu = runtime.from_numpy(np.array([0, 100, 256], np.int32), q, "int32")
    calls = {f"{precision} {backend}": (lambda p=precision, b=backend: lowbit_video.attention(q, k, v, p, backend=b))
             for precision, backend in CALLS}
    given = lowbit_video.Precision("int8+fp8")
    calls["a Precision, hopper"] = lambda: lowbit_video.attention(q, k, v, given, backend="hopper", return_lse=True)
    calls["varlen int8+fp8"] = lambda: lowbit_video.attention_varlen(q[0], k[0], v[0], cu, cu, 156, 156, "int8+fp8")
    found = {}
    for name, call in calls.items():
        groups = []
        for _ in range(60):
            cuda_driver.synchronize(runtime.stream(q))
            begin = time.perf_counter()
            for _ in range(20):
                call()
            groups.append((time.perf_counter() - begin) / 20 * 1e6)
        found[name] = statistics.median(groups[10:])
    return found


def main() -> int:
    """Runs the rounds, compares, writes; the exit status says whether all outputs are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--after", type=Path)
    parser.add_argument("--framework", default="torch", choices=("torch", "paddle"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commits", default="", help="what the trees are, for the record: BEFORE, AFTER")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        warnings.simplefilter("ignore")  # that exact attention is faster at the short shapes
        from lowbit_video.eval.speed.bench import environment

        print(json.dumps({"sha256": outputs(args.framework), "gpu_ms": gpu_times(args.framework),
                          "host_us": host_times(args.framework), "about": environment(args.framework)}))
        return 0
    trees = {"before": args.before, "after": args.after}
    runs: dict[str, list[dict]] = {name: [] for name in trees}
    for number in range(args.rounds):
        for name in sorted(trees, reverse=number % 2 == 0):
            path = os.pathsep.join(filter(None, (str(trees[name].resolve()), os.environ.get("PYTHONPATH"))))
            done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--worker", "--framework", args.framework],
                                  env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True, cwd="/")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    first = runs["before"][0]
    report: dict = {"equal_outputs": all(run["sha256"] == first["sha256"] for some in runs.values() for run in some),
                    "outputs": len(first["sha256"]), "about": first["about"] | {"commit": args.commits}}
    for kind in ("gpu_ms", "host_us"):
        report[kind] = {case: {name: [round(run[kind][case], 4) for run in some] for name, some in runs.items()}
                        for case in first[kind]}
        for case, both in report[kind].items():
            before, after = (statistics.median(both[name]) for name in trees)
            print(f"{kind} {case:<44} {before:9.3f} {after:9.3f}  {after / before:.3f}")
    print("outputs equal:", report["equal_outputs"], "of", report["outputs"])
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["equal_outputs"] else 1


if __name__ == "__main__":
    sys.exit(main())
