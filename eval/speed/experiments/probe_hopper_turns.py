"""Time a few builds of the Hopper attention kernel against the default one, in turns, so that clocks and power are shared.

    python -m lowbit_video.eval.speed.experiments.probe_hopper_turns [--out FOLDER] [--shapes 0,2] [--only NAMES] [--rounds 8]

Uses PyTorch tensors. The builds are compiled and checked in parallel worker processes (relative L1 against float32, V as it
is and shifted by one; two runs must give the same bits), then timed one shape after the other, each run from a cold L2
cache, beside FlashAttention-2. For the default and the fastest builds the total is timed too, quantisation and attention by
events of their own within it. A build that fails is named and left out. Prints a table and writes probe_hopper_turns.json.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time

from . import probe_hopper
from .probe_portable import LIMITS, anchor_error, anchor_reference, make_inputs, relative_l1

DEFAULTS = ("64f8 token line3 hold4", "64f16 lazy", "128f8 pin", "128f16 base")
NAMES = (*DEFAULTS, "64f8 token pin", "64f8 hold", "64f8 token hold", "64f8 token hold6", "64f8 token hold4",
         "64f8 token hold2", "64f8 line2", "64f8 line2 hold4", "64f8 token line1 hold4", "64f8 token line2",
         "64f8 token line2 hold6", "64f8 token line2 hold4", "64f8 token line8 hold4", "64f16 base", "64f16 hold",
         "64f16 lazy hold", "64f16 token lazy hold", "128f8 hold", "128f8 hold4", "128f8 token hold", "128f8 line2 hold4",
         "128f8 token line2 hold4", "128f16 hold", "128f16 hold2", "128f16 token hold", "128f16 lazy", "128f16 lazy hold",
         "128f16 lazy hold2", "128f16 token lazy hold", "128f16 token lazy hold4")
FLASH = "FlashAttention-2"
TOTALS = 3
"""Builds of one P.V format, beside the default, whose total is timed."""
RUNS = 3
"""Runs in a row at each turn."""


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


def in_turns(calls, rounds):
    """name -> (call, mid event or None): {name: [[ms, ms up to the mid event], ...]}; every run from a cold L2 cache."""
    import torch

    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    marks = []
    for turn in range(rounds + 1):  # the first warms up
        names = list(calls) if turn % 2 else list(calls)[::-1]
        for name in names:
            call, middle = calls[name]
            for _ in range(RUNS if turn else 1):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                between = torch.cuda.Event(enable_timing=True) if middle else None
                flush.zero_()
                begin.record()
                call(*([between] if middle else []))
                end.record()
                if turn:
                    marks.append((name, begin, between, end))
        torch.cuda.synchronize()
    times = {name: [] for name in calls}
    for name, begin, between, end in marks:
        times[name].append([begin.elapsed_time(end), begin.elapsed_time(between) if between else 0.0])
    return times


def time_shape(index, names, rounds):
    """Times the builds for one anchor shape; JSON lines."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = probe_hopper.ANCHORS[index]
    b, h, n, d = shape
    table = probe_hopper.candidates()
    q, k, v = make_inputs(shape)
    reference = anchor_reference(q, k, v)
    tell = lambda **row: print("ANSWER " + json.dumps(dict(row, shape=shape)), flush=True)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(q, k, v)

    def totals(case, config):
        def total(middle):
            case.quantize()
            middle.record()
            case.attend_hopper(config)
        return total

    calls, cases, errors, against = {FLASH: (flash, False)}, {}, {}, {}
    for pv in ("fp8", "fp16"):
        mine = [name for name in names if table[name][:2] == (d, pv)]
        if not mine:
            continue
        case = cases[pv] = probe_hopper.HopperCase(q, k, v, "int8", pv)
        case.quantize()
        default = None
        for name in mine:
            try:
                case.out.fill_(float("nan"))
                case.attend_hopper(table[name][2])
                torch.cuda.synchronize()
            except Exception as e:  # noqa: BLE001 - the next build may run
                print(f"FAILED {name}: {str(e)[-200:]}", file=sys.stderr)
                continue
            errors[name] = anchor_error(case, reference)
            default = case.out.clone() if default is None else default
            against[name] = relative_l1(case.out[0, :2], default[0, :2])
            if not errors[name] <= 1.3 * LIMITS[f"int8+{pv}"]:  # NaN fails too
                tell(name=name, ms=0.0, error=errors[name], against=against[name])
                continue
            calls[name] = (lambda case=case, config=table[name][2]: case.attend_hopper(config), False)
        del default
    clocks = Clocks()
    times = in_turns(calls, rounds)
    load = clocks.stop()
    median = {name: statistics.median(ms for ms, _ in rows) for name, rows in times.items()}
    again = {FLASH: (flash, False)}
    for pv, case in cases.items():
        mine = [name for name in calls if name != FLASH and table[name][1] == pv]
        fine = [name for name in mine if name in DEFAULTS or errors[name] <= LIMITS[f"int8+{pv}"]]
        best = sorted((name for name in fine if name not in DEFAULTS), key=median.get)[:TOTALS]
        for name in mine:
            if name in DEFAULTS:  # beside its total, in the same turns
                again[f"alone {name}"] = calls[name]
        for name in [name for name in mine if name in DEFAULTS] + best:
            again[f"TOTAL {name}"] = (totals(case, table[name][2]), True)
    later = in_turns(again, rounds)
    for name, rows in [*times.items(), *((f"{name} again" if name == FLASH else name, rows) for name, rows in later.items())]:
        ordered = sorted(ms for ms, _ in rows)
        tenth = len(ordered) // 10
        row = dict(name=name, ms=statistics.median(ordered), low=ordered[tenth], high=ordered[-1 - tenth])
        if rows[0][1]:
            row.update(quantise=statistics.median(x for _, x in rows), attend=statistics.median(ms - x for ms, x in rows))
        if name in errors:
            row.update(error=errors[name], against=against[name])
        tell(tflops=4 * b * h * n * n * d / row["ms"] / 1e9, clock_power=load, **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shapes", default="0,2", help="indices of anchor shapes")
    parser.add_argument("--only", default="", help="builds' names, comma-separated")
    parser.add_argument("--time", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        return time_shape(*json.loads(options.time))
    began = time.time()
    only = options.only.split(",") if options.only else NAMES
    unknown = [name for name in only if name not in probe_hopper.candidates()]
    if unknown:
        parser.error(f"no builds named {unknown}; there are {list(probe_hopper.candidates())}")
    shapes = [int(index) for index in options.shapes.split(",")]
    dims = {probe_hopper.ANCHORS[index][3] for index in shapes}
    names = [name for name in only if probe_hopper.candidates()[name][0] in dims]
    os.makedirs(options.out, exist_ok=True)
    results, good = [], []
    for (_, name), answer in probe_hopper.run_jobs([("candidate", name) for name in names], options.workers):
        results.append(dict(answer, check=name))
        if answer.get("ok"):
            good.append(name)
        else:
            print(f"FAILED {name}: L1 {answer['error']:.4f}", answer.get("message", ""))
    good = [name for name in names if name in good]
    print(f"{len(good)} of {len(names)} builds are right, {time.time() - began:.0f} s", flush=True)
    for index in shapes:
        process = subprocess.Popen([sys.executable, "-m", "lowbit_video.eval.speed.experiments.probe_hopper_turns", "--time",
                                    json.dumps([index, good, options.rounds])], stdout=subprocess.PIPE, text=True,
                                   start_new_session=True)
        print(f"\n{probe_hopper.ANCHORS[index]}", flush=True)
        flash = None
        while True:
            row = probe_hopper.answer_of(process, 2 * probe_hopper.HANG_S)
            if row is None or row.get("dead"):
                if row is None:
                    print("  HANGS; killed")
                    probe_hopper.kill(process)
                break
            results.append(row)
            if not row["ms"]:
                print(f"  {row['name']:26s} WRONG: l1 {row['error']:.4f}")
                continue
            flash = row["ms"] if row["name"].startswith(FLASH) else flash
            note = f"l1 {row['error']:.4f}, {row['against']:.4f} from default" if "error" in row else ""
            if "quantise" in row:
                note = f"quantise {row['quantise']:.3f} + attend {row['attend']:.3f}"
            print(f"  {row['name']:32s} {row['ms']:8.3f} ms ({row['low']:.3f} to {row['high']:.3f}) "
                  f"{row['tflops']:5.0f} TFLOP/s {flash / row['ms']:.2f}x  {note}", flush=True)
        if results and results[-1].get("clock_power"):
            print("  clock {:.0f} MHz, {:.0f} W while timed".format(*results[-1]["clock_power"]), flush=True)
        with open(os.path.join(options.out, "probe_hopper_turns.json"), "w") as f:  # after every shape: time may run out
            json.dump(dict(results=results), f, indent=0)
    print(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
