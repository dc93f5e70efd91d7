"""Check and time the Hopper attention kernel on this GPU: every feature, then every way to build it, beside exact attention.

    python -m lowbit_video.eval.speed.experiments.probe_hopper [--out FOLDER] [--shapes 0,1] [--only NAME,NAME]

Uses PyTorch tensors. Candidates are compiled and checked in parallel worker processes, each killed if it hangs; those that are
right are timed at the anchor shapes, in a process of its own. Prints one table and writes probe_hopper.json.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from functools import partial

from .probe_portable import LIMITS, Case, anchor_error, anchor_reference, exact_rows, flash_ms, make_inputs, relative_l1

ANCHORS = ((2, 30, 17776, 64), (1, 24, 32768, 128), (4, 32, 8192, 128), (2, 48, 45106, 64))
CAUSAL_SHAPES = ((1, 24, 32768, 64), (1, 24, 32768, 128))
HANG_S = 45
"""A job without an answer for so long is taken to hang."""


def candidates():
    """Name -> (head dim, P.V format, fields of HopperConfig beside the default's)."""
    from lowbit_video.kernels.attention.hopper.build import HopperConfig as C

    a = lambda **k: C(**{**dict(block_n=128, consumers=3, stages=3, registers=160), **k})
    b = lambda **k: C(**{**dict(block_n=128, consumers=2, stages=3, registers=240), **k})
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


class HopperCase(Case):
    """`Case` with the Hopper launcher, beside the portable one."""

    def attend_hopper(self, config=None):
        from lowbit_video.kernels.attention.hopper.launch import launch_attn_fwd

        launch_attn_fwd(
            self.qc, self.kc, self.vc if self.pv == "fp8" else self.v, self.out, q_shape=self.q_shape,
            kv_shape=self.kv_shape, q_format=self.qf, k_format=self.kf, pv_format=self.pv, granularity=self.gran,
            out_strides=self.out.stride()[:3], v_strides=self.v.stride()[:3], q_scale=self.qs, k_scale=self.ks,
            v_scale=self.v_scale if self.pv == "fp8" else None, lse=self.lse,
            lse_shift=self.lse_shift if self.lse is not None else None, sm_scale=self.scale,
            is_causal=self.causal, config=config)


def check_candidate(name):
    """Worst relative L1 at a small ragged shape, V as it is and shifted by one; a second run must give the same bits."""
    import torch

    d, pv, config = candidates()[name]
    worst = 0.0
    for shift in (0.0, 1.0):
        q, k, v = make_inputs((2, 3, 1104 + 57, d), shift)
        case = HopperCase(q, k, v, "int8", pv)
        case.quantize()
        case.out.fill_(float("nan"))
        case.attend_hopper(config)
        worst = max(worst, anchor_error(case, anchor_reference(q, k, v)))
        first = case.out.clone()
        case.out.fill_(float("nan"))
        case.attend_hopper(config)
        if not torch.equal(first, case.out):
            return dict(error=math.inf, message="two runs differ")
    return dict(error=worst, ok=worst <= 1.3 * LIMITS[f"int8+{pv}"])


# name -> (B, Hq, Hkv, Nq, Nk, D), options; every one runs with each precision of PRECISIONS
PRECISIONS = (("int8", "fp8", .05), ("int8", "fp16", .02), ("fp8", "fp8", .07))
FEATURES = {
    "one": ((1, 1, 1, 1, 1, 64), {}),
    "one d128": ((2, 2, 2, 1, 1, 128), {}),
    "63": ((2, 2, 2, 63, 63, 64), {}),
    "226 bf16": ((1, 3, 3, 226, 226, 128), dict(bf16=True)),
    "1000 gqa": ((1, 6, 2, 1000, 1000, 64), {}),
    "17776": ((1, 2, 2, 17776, 17776, 64), {}),
    "17776 d128 causal": ((1, 1, 1, 17776, 17776, 128), dict(causal=True)),
    "q<k": ((2, 2, 1, 130, 517, 128), dict(bf16=True)),
    "q>k": ((1, 2, 2, 700, 97, 64), {}),
    "causal": ((2, 4, 2, 1000, 1000, 64), dict(causal=True)),
    "causal d128 bf16": ((1, 2, 1, 1161, 1161, 128), dict(causal=True, bf16=True)),
    "causal q<k": ((1, 2, 2, 200, 650, 64), dict(causal=True)),
    "causal q>k": ((1, 2, 2, 650, 200, 128), dict(causal=True)),
    "causal one q": ((1, 2, 2, 1, 300, 64), dict(causal=True)),
    "hnd": ((2, 3, 3, 300, 300, 64), dict(hnd=True)),
    "large v": ((1, 2, 2, 300, 300, 64), dict(v_factor=1e4)),
    "large v bf16": ((1, 2, 2, 300, 300, 128), dict(v_factor=1e30, bf16=True)),
    "v + 100": ((1, 2, 2, 500, 500, 64), dict(v_shift=100.0)),
    "tiny q": ((1, 2, 2, 300, 300, 64), dict(q_factor=1e-4)),
    "zeros": ((1, 1, 1, 100, 100, 64), dict(q_factor=0.0, v_factor=0.0)),
    "outlier": ((1, 2, 2, 400, 400, 64), dict(outlier=30.0)),
}


def check_feature(name, precision):
    """One odd case against float32 (out and LSE), with poison around every tensor and a sentinel around the output."""
    import torch

    qf, pv, limit = PRECISIONS[precision]
    (b, hq, hk, nq, nk, d), o = FEATURES[name]
    dtype = torch.bfloat16 if o.get("bf16") else torch.float16
    g = torch.Generator(device="cuda").manual_seed(7)

    def new(n, h, factor=1.0, poison=math.inf):
        pad = 130  # rows of the same head after the end (HND), or of the batch (NHD), that no kernel may use
        shape = (b, h, n + pad, d) if o.get("hnd") else (b, n + pad, h, d)
        x = torch.full(shape, poison, device="cuda", dtype=dtype)
        x = x if o.get("hnd") else x.transpose(1, 2)
        x[:, :, :n] = (torch.randn(b, h, n, d, device="cuda", generator=g) * factor).to(dtype)
        return x[:, :, :n], x

    q, _ = new(nq, hq, o.get("q_factor", 1.0))
    k, _ = new(nk, hk)
    v, _ = new(nk, hk, o.get("v_factor", 1.0))
    v += o.get("v_shift", 0.5 if o.get("v_factor") is None else 0.0)
    channel = 2 * torch.randn(1, hk, 1, d, device="cuda", generator=g)
    channel[..., 3] += o.get("outlier", 0.0)
    k += channel.to(dtype)
    out, around = new(nq, hq, poison=-77.0)
    case = HopperCase(q, k, v, qf, pv, lse=True, causal=bool(o.get("causal")))
    case.out = out
    out.fill_(float("nan"))
    case.lse.fill_(float("nan"))
    case.quantize()
    case.attend_hopper()
    torch.cuda.synchronize()
    if not bool((around[:, :, nq:] == -77.0).all()):
        return dict(error=math.inf, ok=False, message="wrote outside the output")
    error = lse_error = 0.0
    rows = torch.arange(nq, device="cuda") if nq <= 2000 else torch.cat(
        [torch.arange(300, device="cuda"), torch.arange(nq - 300, nq, device="cuda")])
    for i in range(b):
        wanted, lse = exact_rows(q[i], k[i], v[i], rows, case.causal)
        got, seen = case.lse[i][:, rows], torch.isfinite(lse)
        if not bool((torch.isneginf(got) == ~seen).all()) or bool(torch.isnan(got).any()):
            return dict(error=math.inf, ok=False, message="LSE -inf or NaN in the wrong places")
        lse_error = max(lse_error, (got - lse)[seen].abs().mean().item() if bool(seen.any()) else 0.0)
        if o.get("v_factor") == 0.0:
            error = max(error, out[i].abs().max().item())
        else:
            error = max(error, relative_l1(out[i][:, rows], wanted))
    return dict(error=error, lse_error=lse_error, ok=error <= limit and lse_error <= limit)


def worker():
    """Reads jobs as JSON lines, answers with JSON lines."""
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        began = time.time()
        try:
            answer = check_candidate(*arguments) if kind == "candidate" else check_feature(*arguments)
        except Exception as e:  # noqa: BLE001 - the report says what failed
            answer = dict(error=math.inf, ok=False, message=repr(e)[-300:])
        print("ANSWER " + json.dumps(dict(answer, seconds=round(time.time() - began, 1))), flush=True)


def spawn(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "lowbit_video.eval.speed.experiments.probe_hopper", *arguments],
                            stdout=subprocess.PIPE, text=True, start_new_session=True, **options)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)


def answer_of(process, seconds):
    """The worker's next answer, or None when it hangs or dies."""
    until = time.time() + seconds
    while time.time() < until:
        if select.select([process.stdout], [], [], max(0.0, until - time.time()))[0]:
            line = process.stdout.readline()
            if not line:
                return dict(error=math.inf, ok=False, message=f"the process ended ({process.poll()})", dead=True)
            if line.startswith("ANSWER "):
                return json.loads(line[7:])
    return None


def run_jobs(jobs, workers):
    """[(job, answer)] of all jobs, in `workers` processes."""
    todo, done = queue.Queue(), []
    for job in jobs:
        todo.put(job)

    def serve():
        process, first = None, True
        while True:
            try:
                job = todo.get_nowait()
            except queue.Empty:
                break
            if process is None:
                process, first = spawn("--worker", stdin=subprocess.PIPE, stderr=subprocess.DEVNULL), True
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = answer_of(process, HANG_S + (30 if first else 0))
            first = False
            if answer is None or answer.get("dead"):
                kill(process)
                process = None
                answer = answer or dict(error=math.inf, ok=False, message="HANGS")
            done.append((job, answer))
        if process is not None:
            process.stdin.close()
            process.wait()

    threads = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def time_shape(index, names):
    """Times candidates at one anchor shape, beside FlashAttention-2, cuDNN and the portable kernel; JSON lines."""
    import triton

    causal = index >= len(ANCHORS)
    shape = (ANCHORS + CAUSAL_SHAPES)[index]
    b, h, n, d = shape
    flops = 4 * b * h * n * n * d
    bench = lambda f: triton.testing.do_bench(f, warmup=20, rep=120 if n < 40000 else 250, return_mode="median")

    def say(**row):
        row.update(shape=shape, causal=causal, tflops=flops * (0.5 if row.get("causal_run") else 1) / row["ms"] / 1e9)
        print("ANSWER " + json.dumps(row), flush=True)

    q, k, v = make_inputs(shape)
    if not causal:
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            try:
                say(name=backend, ms=flash_ms(q, k, v, bench, backend))
            except RuntimeError as e:
                print(f"{backend}: {str(e)[:80]}", file=sys.stderr)
    table = candidates()
    reference = anchor_reference(q, k, v)
    for pv in ("fp8", "fp16"):
        case = HopperCase(q, k, v, "int8", pv)
        case.quantize()
        mine = [name for name in names if table[name][:2] == (d, pv)]
        if causal:
            for run in (False, True):
                case.causal = run
                for name in [None, *mine]:
                    config = table[name][2] if name else None
                    case.attend_hopper(config)
                    say(name=f"{pv} {name or 'default'}", ms=bench(partial(case.attend_hopper, config)), causal_run=run)
            continue
        best = (math.inf, None)
        for name in mine:
            config = table[name][2]
            case.out.fill_(float("nan"))
            case.attend_hopper(config)
            error = anchor_error(case, reference)
            ms = bench(partial(case.attend_hopper, config))
            say(name=name, ms=ms, error=error)
            if error <= LIMITS[f"int8+{pv}"]:
                best = min(best, (ms, name), key=lambda x: x[0])
        say(name=f"quantise {pv}", ms=bench(case.quantize))
        say(name=f"portable {pv}", ms=bench(case.attend))
        if best[1]:
            config = table[best[1]][2]

            def total(case=case, config=config):
                case.quantize()
                case.attend_hopper(config)

            say(name=f"TOTAL {best[1]}", ms=bench(total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--shapes", default="0,1,2,3", help="indices of anchor shapes, then of the causal ones")
    parser.add_argument("--only", default="", help="candidates' names, comma-separated")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--time", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker()
    if options.time:
        index, names = json.loads(options.time)
        return time_shape(index, names)
    began = time.time()
    table = candidates()
    names = [name for name in table if not options.only or name in options.only.split(",")]
    jobs = [("candidate", name) for name in names] + [("feature", name, i) for name in FEATURES for i in range(len(PRECISIONS))]
    results, good, failed = [], [], 0
    for job, answer in run_jobs(jobs, options.workers):
        results.append(dict(answer, job=job))
        if answer.get("ok"):
            good.append(job[1])
        else:
            failed += 1
            what = job[1] if job[0] == "candidate" else f"{job[1]} {'+'.join(PRECISIONS[job[2]][:2])}"
            print(f"FAILED {what}: L1 {answer['error']:.4f} lse {answer.get('lse_error', math.nan):.4f}",
                  answer.get("message", ""))
    good = [name for name in names if name in good]
    print(f"{len(jobs) - failed} of {len(jobs)} checks passed in {time.time() - began:.0f} s", flush=True)
    for index in map(int, options.shapes.split(",")):
        shape = (ANCHORS + CAUSAL_SHAPES)[index]
        process = spawn("--time", json.dumps([index, good if index < len(ANCHORS) else []]))
        print(f"\n{shape}{' causal' if index >= len(ANCHORS) else ''}", flush=True)
        fa2 = None
        while True:
            row = answer_of(process, HANG_S)
            if row is None or row.get("dead"):
                if row is None:
                    print("  HANGS; killed")
                    kill(process)
                break
            results.append(row)
            fa2 = row["ms"] if row["name"] == "FLASH_ATTENTION" else fa2
            ratio = f"{fa2 / row['ms']:.2f}x FA2" if fa2 else ""
            l1 = f"l1 {row['error']:.4f}" if "error" in row else "causal" if row.get("causal_run") else ""
            print(f"  {row['name']:26s} {row['ms']:8.3f} ms {row['tflops']:6.0f} TFLOP/s {ratio} {l1}", flush=True)
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, "probe_hopper.json"), "w") as f:
        json.dump(dict(results=results, candidates={name: asdict(table[name][2]) for name in names}), f, default=str, indent=0)
    print(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
