"""Check and time builds of the Hopper kernel in turns with the default ones and FlashAttention-2: what `CONFIGS` is chosen by.

    python -m lowbit_video.eval.speed.experiments.hopper_builds [--shapes LIST] [--only NAME,NAME] [--out FOLDER]

Uses PyTorch tensors, INT8 Q and K. Every build is compiled and checked in a worker process first, V as it is and shifted by
one, twice with the same bits; one that hangs is killed. Of the default and the fastest builds the total is timed too,
quantisation counted. Prints a table and writes hopper_builds.json.
"""
from __future__ import annotations

import argparse
import json
import os
import queue
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lowbit_video.kernels.attention.hopper.build import CONFIGS, HopperConfig

from .. import accuracy, bench, timing, tune
from ..baselines import BASELINES
from ..shapes import Shape, parse_shapes

LIMITS = {"fp8": 0.042, "fp16": 0.013}
"""Largest accepted relative L1 by P.V's format; at a short length, where rows differ more, by SHORT_SLACK more."""
SHORT_SLACK = 1.3
SHORT_TOKENS = 1104 + 57
HANG_S = 45
"""A job without an answer for so long is taken to hang; the first of a process has START_S more."""
START_S = 30
TOTALS = 3
"""Builds of one P.V format, beside the default, whose total is timed."""


def candidates() -> dict[str, tuple[int, str, HopperConfig]]:
    """Name -> (head dim, P.V format, how to build)."""
    a = lambda **k: HopperConfig(**{**dict(block_n=128, consumers=3, stages=3, registers=160), **k})
    b = lambda **k: HopperConfig(**{**dict(block_n=128, consumers=2, stages=3, registers=240), **k})
    return {
        "64f8 base": (64, "fp8", a()),
        "64f8 pin": (64, "fp8", a(pin=True)),
        "64f8 token": (64, "fp8", a(turns=True)),
        "64f8 token pin": (64, "fp8", a(turns=True, pin=True)),
        "64f8 st4": (64, "fp8", a(stages=4)),
        "64f8 adds": (64, "fp8", a(sum_mma=False)),
        "64f8 bn64": (64, "fp8", a(block_n=64, stages=4)),
        "64f8 hold": (64, "fp8", a(hold=8)),
        "64f8 token hold": (64, "fp8", a(turns=True, hold=8)),
        "64f8 token hold6": (64, "fp8", a(turns=True, hold=6)),
        "64f8 token hold4": (64, "fp8", a(turns=True, hold=4)),
        "64f8 token hold2": (64, "fp8", a(turns=True, hold=2)),
        "64f8 hold adds": (64, "fp8", a(hold=8, sum_mma=False)),
        "64f8 line2": (64, "fp8", a(hold=8, line=2)),
        "64f8 line2 hold4": (64, "fp8", a(hold=4, line=2)),
        "64f8 token line1 hold4": (64, "fp8", a(turns=True, hold=4, line=1)),
        "64f8 token line2": (64, "fp8", a(turns=True, hold=8, line=2)),
        "64f8 token line2 hold4": (64, "fp8", a(turns=True, hold=4, line=2)),
        "64f8 token line2 hold6": (64, "fp8", a(turns=True, hold=6, line=2)),
        "64f8 token line3 hold4": (64, "fp8", a(turns=True, hold=4, line=3)),
        "64f8 token line8 hold4": (64, "fp8", a(turns=True, hold=4, line=8)),
        "64f16 base": (64, "fp16", a(sum_mma=False)),
        "64f16 hold": (64, "fp16", a(sum_mma=False, hold=8)),
        "64f16 token hold": (64, "fp16", a(sum_mma=False, turns=True, hold=8)),
        "64f16 lazy": (64, "fp16", a(sum_mma=False, lazy=True)),
        "64f16 lazy hold": (64, "fp16", a(sum_mma=False, lazy=True, hold=8)),
        "64f16 token lazy hold": (64, "fp16", a(sum_mma=False, lazy=True, turns=True, hold=8)),
        "128f8 token": (128, "fp8", b(turns=True)),
        "128f8 base": (128, "fp8", b()),
        "128f8 pin": (128, "fp8", b(pin=True)),
        "128f8 token pin": (128, "fp8", b(turns=True, pin=True)),
        "128f8 hold": (128, "fp8", b(hold=8)),
        "128f8 hold4": (128, "fp8", b(hold=4)),
        "128f8 token hold": (128, "fp8", b(turns=True, hold=8)),
        "128f8 hold adds": (128, "fp8", b(hold=8, sum_mma=False)),
        "128f8 line2 hold4": (128, "fp8", b(hold=4, line=2)),
        "128f8 token line2 hold4": (128, "fp8", b(turns=True, hold=4, line=2)),
        "128f8 token st4": (128, "fp8", b(turns=True, stages=4)),
        "128f8 adds": (128, "fp8", b(sum_mma=False)),
        "128f16 base": (128, "fp16", b(sum_mma=False)),
        "128f16 hold": (128, "fp16", b(sum_mma=False, hold=8)),
        "128f16 hold2": (128, "fp16", b(sum_mma=False, hold=2)),
        "128f16 token hold": (128, "fp16", b(sum_mma=False, turns=True, hold=8)),
        "128f16 lazy": (128, "fp16", b(sum_mma=False, lazy=True)),
        "128f16 lazy hold": (128, "fp16", b(sum_mma=False, lazy=True, hold=8)),
        "128f16 lazy hold2": (128, "fp16", b(sum_mma=False, lazy=True, hold=2)),
        "128f16 token lazy hold": (128, "fp16", b(sum_mma=False, lazy=True, turns=True, hold=8)),
        "128f16 token lazy hold4": (128, "fp16", b(sum_mma=False, lazy=True, turns=True, hold=4)),
    }


def check(name: str) -> dict:
    """Whether a build is right at a short, ragged length, and gives the same bits twice; the worst relative L1."""
    import torch

    head_dim, pv, config = candidates()[name]
    shape, worst = Shape("", 2, 3, SHORT_TOKENS, head_dim), 0.0
    for v_offset in (0.0, 1.0):
        runtime, [(_, call)], tensors = tune.calls_of(shape, f"int8+{pv}", "hopper", [config], "torch", "float16", v_offset)
        outs = []
        for _ in range(2):
            call.out.fill_(float("nan"))
            outs.append(call.run().clone())
        want = accuracy.reference(runtime, *tensors, scale=shape.head_dim**-0.5)
        worst = max(worst, accuracy.errors(runtime, outs[0], want)[0])
        if not torch.equal(*outs):
            return dict(ok=False, error=worst, message="two runs differ")
    return dict(ok=worst <= SHORT_SLACK * LIMITS[pv], error=worst)


def work(check: Callable[[str], dict]) -> None:
    """Reads names of builds as lines, answers with JSON lines of what their check says."""
    for line in sys.stdin:
        try:
            answer = check(line.strip())
        except Exception as e:  # noqa: BLE001 - the report says what failed
            answer = dict(ok=False, message=repr(e)[-300:])
        print("ANSWER " + json.dumps(answer), flush=True)


def answer_of(process: subprocess.Popen, seconds: float) -> dict | None:
    """The worker's next answer, or None when it hangs or dies."""
    until = time.time() + seconds
    while select.select([process.stdout], [], [], max(0.0, until - time.time()))[0]:
        line = process.stdout.readline()
        if line.startswith("ANSWER "):
            return json.loads(line[7:])
        if not line:
            break
    return None


def check_all(names: list[str], workers: int, module: str) -> dict[str, dict]:
    """The answers to names of so many processes that each run `module --worker`; one that hangs is killed."""
    todo, done = queue.Queue(), {}
    for name in names:
        todo.put(name)

    def serve():
        process = None
        while not todo.empty():
            try:
                name = todo.get_nowait()
            except queue.Empty:
                break
            first = process is None
            if first:
                process = subprocess.Popen([sys.executable, "-m", module, "--worker"], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
            process.stdin.write(name + "\n")
            process.stdin.flush()
            done[name] = answer_of(process, HANG_S + START_S * first) or dict(ok=False, message="hangs, or its process died")
            if "hangs" in done[name].get("message", ""):
                os.killpg(process.pid, signal.SIGKILL)
                process = None
        if process is not None:
            process.stdin.close()
            process.wait()

    threads = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


class Clocks:
    """The GPU's clock (MHz) and power (W), sampled while timing."""

    def __init__(self):
        self.rows, self.process = [], None
        try:
            self.process = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        except OSError:
            pass

    def _read(self):
        for line in self.process.stdout:
            try:
                self.rows.append([float(x) for x in line.split(",")])
            except ValueError:
                pass

    def stop(self):
        """Medians of clock and power over the samples under load."""
        if self.process:
            self.process.terminate()
        busy = [row for row in self.rows if len(row) == 2 and row[1] > 250]
        return [statistics.median(column) for column in zip(*busy)] if busy else None


def time_shape(shape: Shape, builds: dict[str, HopperConfig], pv: str) -> list[dict]:
    """Times FlashAttention-2, the kernel of every build and the totals of the best at one shape; a row each."""
    spec, names = f"int8+{pv}", {tune.describe(config): name for name, config in builds.items()}
    runtime, good, (q, k, v) = tune.right_calls(shape, spec, "hopper", list(builds.values()), "torch", "float16", print,
                                                LIMITS[pv], v_offset=0.0)
    flash, timer = BASELINES[0], timing.Timer(runtime, q)
    calls = {flash.name: flash.make(q, k, v, shape.causal)}
    calls |= {name: bench.guarded(runtime, q, call.attend) for name, (_, call, _) in good.items()}
    clocks = Clocks()
    times = timing.time_together(timer, calls)
    load = clocks.stop()
    default = tune.describe(CONFIGS[shape.head_dim, pv == "fp8"])
    best = sorted((name for name in good if name != default), key=lambda name: times[name].median_ms)[:TOTALS]
    totals = {f"TOTAL {name}": good[name][1].run for name in (default, *best) if name in good}
    times |= timing.time_together(timer, totals | {f"{flash.name} again": calls[flash.name]})
    rows = []
    for name, took in times.items():
        build = name.removeprefix("TOTAL ")
        row = dict(shape=shape.dims, name=name.replace(build, names.get(build, build)), ms=took.median_ms, low=took.low_ms,
                   high=took.high_ms, tflops=shape.flops / took.median_ms / 1e9, clock_power=load)
        if build in good:
            row.update(error=good[build][2], default=build == default, config=asdict(good[build][0]))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--shapes", default="2,30,17776,64;4,32,8192,128", help="as of `lowbit-video bench kernels`")
    parser.add_argument("--only", default="", help="builds' names, comma-separated; the default ones are always timed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(check)
    table, shapes = candidates(), parse_shapes(options.shapes)
    unknown = set(filter(None, options.only.split(","))) - set(table)
    if unknown:
        parser.error(f"no builds named {sorted(unknown)}; there are {list(table)}")
    chosen = {name: row for name, row in table.items() if row[0] in {shape.head_dim for shape in shapes}
              and (not options.only or name in options.only.split(",") or row[2] == CONFIGS[row[0], row[1] == "fp8"])}
    checks = check_all(list(chosen), options.workers, __spec__.name)
    for name, answer in checks.items():
        if not answer["ok"]:
            print(f"FAILED {name}: {answer}")
    rows: list[dict] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        for pv in ("fp8", "fp16"):
            builds = {name: config for name, (head_dim, format, config) in chosen.items()
                      if (head_dim, format) == (shape.head_dim, pv) and checks[name]["ok"]}
            print(f"\n{shape} int8+{pv}", flush=True)
            rows += (new := time_shape(shape, builds, pv))
            for row in new:
                note = f"relative L1 {row['error']:.4f}{', default' * row['default']}" if "error" in row else ""
                print(f"  {row['name']:34s} {row['ms']:8.3f} ms ({row['low']:.3f} to {row['high']:.3f}) "
                      f"{row['tflops']:5.0f} TFLOP/s {new[0]['ms'] / row['ms']:.2f}x  {note}", flush=True)
            about = bench.environment("torch")
            (options.out / "hopper_builds.json").write_text(json.dumps(dict(about=about, checks=checks, rows=rows), indent=1))


if __name__ == "__main__":
    main()
