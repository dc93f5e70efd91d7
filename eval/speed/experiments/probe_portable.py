"""Check and time the portable Triton kernels on this GPU: quantisers in GB/s, attention by tile, totals, FlashAttention-2.

    python -m lowbit_video.eval.speed.experiments.probe_portable [--out FOLDER] [--quick | --table]

Uses PyTorch tensors. Every (kernel, tile) is compiled and checked at a small shape in parallel processes first; then each
is checked again and timed at the anchor shapes. Prints one table and writes probe_portable.json. --table: the tuning table's
tile and a few rivals only, of fewer precisions, quantisation beside the time that its bytes take.
"""
from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from dataclasses import astuple

ANCHORS = ((2, 30, 17776, 64), (1, 24, 32768, 128), (4, 32, 8192, 128))
SMALL = {64: (1, 2, 1104, 64), 128: (1, 2, 1104, 128)}
# rows x keys, warps, stages, register cap (0: none), row sums by tensor cores (1); by (Q and K format, P.V format, head dim)
TILES = {
    ("int8", "fp16", 64): "64x128 4 2 0 0, 64x128 4 2 0 1, 64x128 4 3 0 1, 128x128 8 2 0 1, 128x64 4 3 0 1, "
                          "64x64 4 3 0 1, 128x64 8 3 0 1, 64x128 4 2 128 1, 64x128 4 2 128 0",
    ("int8", "fp16", 128): "64x128 4 2 0 0, 64x128 4 2 0 1, 128x128 8 2 0 1, 128x128 8 2 0 0, 128x128 8 3 0 1, "
                           "64x64 4 3 0 1, 64x64 4 3 168 0, 128x64 8 3 0 1, 128x64 8 3 128 1, 128x64 4 3 0 0, 128x64 4 3 0 1, "
                           "64x128 4 2 168 1",
    ("int8", "fp8", 64): "64x128 4 3 0 0, 64x128 4 3 128 0, 64x128 4 2 128 0, 64x128 4 3 168 0, 64x128 4 3 168 1, "
                         "64x128 4 3 128 1, 128x128 8 3 0 0, 64x64 4 3 0 0",
    ("int8", "fp8", 128): "64x128 4 2 0 0, 64x128 4 2 168 0, 64x128 4 2 168 1, 64x128 4 3 0 0, 128x128 8 3 0 0, "
                          "128x128 8 2 0 1, 64x64 4 3 168 0, 128x64 8 3 0 0",
    ("fp8", "fp8", 64): "64x128 4 3 0 0, 64x128 4 3 128 0",
    ("fp8", "fp8", 128): "64x128 4 2 0 0, 64x128 4 2 168 0",
    ("int4", "fp16", 64): "64x128 4 2 0 0, 128x64 8 3 0 1, 64x128 4 2 0 1",
    ("int4", "fp16", 128): "64x128 4 2 0 0, 128x64 8 3 0 1, 64x64 4 3 0 1",
    ("int4", "fp8", 64): "64x128 4 3 168 0, 128x64 8 3 0 0",
    ("int4", "fp8", 128): "64x128 4 2 0 0, 128x64 8 3 0 0",
    ("fp16", "fp16", 64): "64x128 4 2 0 0, 64x128 4 2 0 1, 128x128 8 2 0 1, 128x64 8 3 0 1, 64x64 4 3 0 1, 128x64 4 3 0 1",
    ("fp16", "fp16", 128): "64x128 4 2 0 1, 128x128 8 2 0 0, 128x128 8 2 0 1, 128x64 8 3 0 1, 64x64 4 3 0 1",
}
RIVALS = {  # beside the tuning table's own tile, with --table
    ("int8", "fp16", 64): "64x128 4 2 0 0, 128x64 4 3 0 0, 64x64 4 3 0 0",
    ("int8", "fp16", 128): "64x64 4 2 0 0, 64x128 4 2 0 0, 128x64 4 3 0 1, 128x128 8 3 0 0",
    ("int8", "fp8", 64): "64x128 4 2 128 0, 64x128 4 3 0 0, 64x128 4 4 0 0",
    ("int8", "fp8", 128): "64x128 4 2 168 0, 64x128 4 3 168 0, 64x128 4 3 0 0",
    ("int4", "fp16", 128): "",
    ("int4", "fp8", 64): "",
    ("fp16", "fp16", 64): "64x128 4 2 0 0, 64x64 4 2 0 0",
    ("fp16", "fp16", 128): "64x64 4 2 0 0, 64x64 4 3 0 0",
}
MEMORY_GB_PER_S = 4300
"""What a copy reaches on an H200."""


def parse_tiles(text: str) -> list[tuple]:
    """TileConfig arguments of every tile in a row of TILES."""
    tiles = []
    for item in filter(None, text.split(",")):
        shape, *rest = item.split()
        warps, stages, registers, sum_mma = map(int, rest)
        tiles.append((*map(int, shape.split("x")), warps, stages, registers or None, bool(sum_mma)))
    return tiles


def with_table(chosen: dict[tuple, str], arch: tuple[int, int]) -> dict[tuple, list[tuple]]:
    """The tiles of every key, the tuning table's own for `arch` first."""
    from lowbit_video.kernels.tuning import family, lookup

    found = {}
    for (qf, pv, d), text in chosen.items():
        own = astuple(lookup(family(qf, qf, pv), arch, d))
        found[qf, pv, d] = list(dict.fromkeys([own, *parse_tiles(text)]))
    return found


LIMITS = {"int8+fp16": 0.013, "int8+fp8": 0.042, "fp8+fp8": 0.055, "int4+fp16": 0.15, "int4+fp8": 0.16, "fp16+fp16": 0.001}
"""Largest accepted relative L1 against float32 on the anchors' input."""


def make_inputs(shape, shift=0.0, dtype=None):
    """q, k, v: standard normal, K with an offset channel by channel (two times a normal vector), V shifted."""
    import torch

    b, h, n, d = shape
    g = torch.Generator(device="cuda").manual_seed(1)
    new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.float16, generator=g).to(dtype or torch.float16)
    return new(b, h, n, d), new(b, h, n, d) + 2 * new(1, h, 1, d), new(b, h, n, d) + shift


class Case:
    """One precision on given tensors: buffers allocated once, `quantize()` and `attend(tile)` launch."""

    def __init__(self, q, k, v, qf, pv, *, kf=None, causal=False, lse=False, token=None, cu_q=None, cu_k=None):
        import torch

        from lowbit_video.kernels.formats import scale_block
        from lowbit_video.kernels.quant import shapes

        self.q, self.k, self.v, self.qf, self.kf, self.pv, self.causal = q, k, v, qf, kf or qf, pv, causal
        self.exact = qf in ("fp16", "bf16")
        self.token = (self.kf in ("int4", "int2")) if token is None else token
        self.smooth_q = qf in ("int4", "int2")
        self.cu_q, self.cu_k = cu_q, cu_k
        new = lambda shape, dtype=torch.float32: torch.empty(shape, device="cuda", dtype=dtype)
        varlen = cu_q is not None
        self.sequences = cu_q.numel() - 1 if varlen else q.shape[0]
        self.q_shape = (self.sequences, *q.shape[1:])
        self.kv_shape = (self.sequences, *k.shape[1:])
        self.max_q = int((cu_q[1:] - cu_q[:-1]).max()) if varlen else None
        self.max_k = int((cu_k[1:] - cu_k[:-1]).max()) if varlen else None
        qs, ks = self.q_shape, self.kv_shape
        gran = "token" if self.token else "block"
        self.gran = gran
        self.out = torch.full_like(q, float("nan"))
        self.scale = q.shape[-1] ** -0.5
        self.group = q.shape[1] // k.shape[1]
        b, hk, d = ks[0], ks[1], ks[3]
        self.lse = new((b, qs[1], qs[2]) if not varlen else (qs[1], qs[2])) if lse else None
        if self.exact:
            return
        self.lse_shift = new(self.lse.shape) if lse else None
        self.k_mean, self.v_scale = new((b, hk, d)), new((b, hk, d))
        scratch = 2 * math.prod(shapes.partial_shape(ks, self.max_k))
        self.q_mean = self.bias = None
        if self.smooth_q:
            self.q_mean = new((b, qs[1], d))
            scratch += math.prod(shapes.partial_shape(qs, self.max_q))
            self.bias = new((b, qs[1], ks[2]) if not varlen else (qs[1], ks[2]))
        self.partial = new((scratch,))
        self.qc = new(shapes.code_shape(qs, qf, varlen), torch.uint8)
        self.kc = new(shapes.code_shape(ks, self.kf, varlen), torch.uint8)
        self.qs = new(shapes.scale_shape(qs, None, varlen))
        self.ks = new(shapes.scale_shape(ks, scale_block("k", gran), varlen))
        if pv == "fp8":
            self.vc = new(shapes.v_code_shape(ks, varlen), torch.uint8)

    def stats(self):
        from lowbit_video.kernels.quant import token_stats

        kw = {}
        if self.pv == "fp8":
            kw.update(v=self.v, v_strides=self.v.stride()[:3], v_scale=self.v_scale)
        if self.smooth_q:
            kw.update(q=self.q, q_strides=self.q.stride()[:3], q_mean=self.q_mean, q_shape=self.q_shape)
        token_stats.launch_stats(self.partial, k=self.k, k_strides=self.k.stride()[:3], k_mean=self.k_mean,
                                 kv_shape=self.kv_shape, cu_seqlens_q=self.cu_q, cu_seqlens_k=self.cu_k, max_q=self.max_q,
                                 max_k=self.max_k, **kw)

    def quant_q(self):
        from lowbit_video.kernels.quant.quant_qk import launch_quant_qk

        launch_quant_qk(self.q, self.q.stride()[:3], self.qc, self.qs, shape=self.q_shape, format=self.qf, block=None,
                        mean=self.q_mean, lse_shift=self.lse_shift, k_mean=self.k_mean,
                        sm_scale=self.scale, group=self.group, cu_seqlens=self.cu_q, max_len=self.max_q)

    def quant_k(self):
        from lowbit_video.kernels.formats import scale_block
        from lowbit_video.kernels.quant.quant_qk import launch_quant_qk

        launch_quant_qk(self.k, self.k.stride()[:3], self.kc, self.ks, shape=self.kv_shape, format=self.kf,
                        block=scale_block("k", self.gran), mean=self.k_mean, bias=self.bias, q_mean=self.q_mean,
                        group=self.group, cu_seqlens=self.cu_k, max_len=self.max_k)

    def quant_v(self):
        from lowbit_video.kernels.quant.quant_v import launch_quant_v

        if self.pv == "fp8":
            launch_quant_v(self.v, self.v.stride()[:3], self.vc, self.v_scale, shape=self.kv_shape, cu_seqlens=self.cu_k,
                           max_len=self.max_k)

    def quantize(self):
        if not self.exact:
            self.stats()
            self.quant_v()
            self.quant_k()
            self.quant_q()

    def attend(self, tile=None):
        import torch

        from lowbit_video.kernels.attention.portable import launch_attn_fwd
        from lowbit_video.kernels.tuning import TileConfig

        e = self.exact
        launch_attn_fwd(
            self.q if e else self.qc, self.k if e else self.kc, self.vc if self.pv == "fp8" else self.v, self.out,
            q_shape=self.q_shape, kv_shape=self.kv_shape, q_format=self.qf, k_format=self.kf, pv_format=self.pv,
            granularity=self.gran, out_strides=self.out.stride()[:3], v_strides=self.v.stride()[:3],
            q_strides=self.q.stride()[:3], k_strides=self.k.stride()[:3], q_scale=None if e else self.qs,
            k_scale=None if e else self.ks, v_scale=self.v_scale if self.pv == "fp8" else None, bias=None if e else self.bias,
            lse=self.lse, lse_shift=None if e else self.lse_shift, sm_scale=self.scale, is_causal=self.causal,
            cu_seqlens_q=self.cu_q, cu_seqlens_k=self.cu_k, max_q=self.max_q, max_k=self.max_k,
            arch=torch.cuda.get_device_capability(), config=TileConfig(*tile) if tile else None)

    def names(self):
        return f"{self.qf}{'' if self.kf == self.qf else '/' + self.kf}+{self.pv}"


def quantiser_variants(case, bench):
    """Milliseconds of the statistics by (chunk, elements of a tile, warps), and of Q (and K by token) by rows of a program."""
    import torch

    from lowbit_video.kernels.quant import quant_qk, token_stats

    times, scratch = {}, case.partial
    case.partial = torch.empty(4 * scratch.numel(), device="cuda")

    def vary(module, names, step, variants, label=""):
        default = tuple(getattr(module, name) for name in names)
        for variant in (default, *variants):
            for name, value in zip(names, variant):
                setattr(module, name, value)
            times[f"{label}{names[0].partition('_')[0].lower()} {variant}"] = bench(step)
        for name, value in zip(names, default):
            setattr(module, name, value)

    vary(token_stats, ("STATS_CHUNK", "STATS_TILE", "STATS_WARPS"), case.stats,
         ((256, 65536, 8), (256, 4096, 4), (512, 8192, 8), (1024, 4096, 4)))
    vary(quant_qk, ("TOKEN_ROWS",), case.quant_q, ((32,), (128,)))
    if case.token:
        vary(quant_qk, ("TOKEN_ROWS",), case.quant_k, ((32,), (128,)), "K ")
    case.partial = scratch
    print("    " + ", ".join(f"{name} {ms * 1e3:.0f}us" for name, ms in times.items()))
    return times


def exact_rows(q, k, v, rows, causal=False):
    """float32 attention (out, lse) of some rows of [Hq, Nq, D], [Hkv, Nkv, D]."""
    import torch

    group = q.shape[0] // k.shape[0]
    s = q[:, rows].float() @ k.float().repeat_interleave(group, 0).transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.arange(k.shape[1], device=q.device)[None] > (rows + k.shape[1] - q.shape[1])[:, None]
        s = s.masked_fill(hidden[None], -math.inf)
    lse = torch.logsumexp(s, -1)
    return torch.nan_to_num(s.softmax(-1)) @ v.float().repeat_interleave(group, 0), lse


def relative_l1(out, ref):
    error = ((out.float() - ref).abs().sum() / ref.abs().sum()).item()
    return error if math.isfinite(error) else math.inf


def anchor_error(case, reference):
    """Relative L1 on sampled rows of the first and last head."""
    import torch

    rows, ref = reference
    out = torch.stack([case.out[0, 0][rows], case.out[-1, -1][rows]])
    return relative_l1(out, ref)


def anchor_reference(q, k, v):
    import torch

    n = q.shape[2]
    rows = torch.cat([torch.arange(0, 256), torch.arange(max(n - 200, 0), n)]).to(q.device)
    heads = ((0, 0), (-1, q.shape[1] - 1))
    return rows, torch.stack([exact_rows(q[b, h:h + 1], k[b, h:h + 1], v[b, h:h + 1], rows)[0][0] for b, h in heads])


def warm(job):
    """Compile one (precision, tile) in a worker and check it at a small shape, V shifted by one too."""
    import torch

    (qf, pv, d), tile = job
    torch.cuda.set_device(0)
    began = time.time()
    try:
        worst = 0.0
        for shift in (0.0, 1.0):
            q, k, v = make_inputs(SMALL[d], shift)
            case = Case(q, k, v, qf, pv)
            case.quantize()
            case.attend(tile)
            worst = max(worst, anchor_error(case, anchor_reference(q, k, v)))
        return job, worst, time.time() - began, ""
    except Exception as e:  # noqa: BLE001 - the report says what failed
        return job, math.inf, time.time() - began, repr(e)[-300:]


CHECKS = [  # name, (B, Hq, Hkv, Nq, Nk, D), formats, options, limit
    (f"{qf}/{kf}+{pv} {gran}", (1, 4, 2, 333, 417, d), (qf, kf, pv), dict(token=gran == "token", lse=True, causal=causal),
     limit)
    for qf, kf, pv, limit in (("int8", "int8", "fp16", .02), ("int8", "int8", "fp8", .05), ("fp8", "fp8", "fp8", .07),
                              ("fp8", "fp8", "fp16", .06), ("int4", "int4", "fp16", .25), ("int4", "int4", "fp8", .26),
                              ("int8", "int4", "fp16", .2), ("int8", "int2", "fp16", .5), ("int2", "int2", "fp8", .7),
                              ("fp16", "fp16", "fp16", .001))
    for gran, d, causal in (("block", 64, False), ("token", 128, True))
] + [(f"int8+{pv} D{d}", (1, 2, 2, 200, 333, d), ("int8", "int8", pv), dict(lse=True, causal=d == 96), .06)
     for pv in ("fp16", "fp8") for d in (72, 96, 256)] + [
    ("int8+fp16 one key", (1, 1, 1, 1, 1, 64), ("int8", "int8", "fp16"), dict(lse=True), .02),
    ("int8+fp8 63", (2, 2, 2, 63, 63, 64), ("int8", "int8", "fp8"), dict(lse=True), .05),
    ("int8+fp16 short keys causal", (1, 2, 2, 300, 100, 64), ("int8", "int8", "fp16"), dict(lse=True, causal=True), .02)]


def check(item):
    """One odd case against float32, in NHD memory, bfloat16 for every other one; and the same packed with cu_seqlens."""
    import torch

    index, (name, (b, hq, hk, nq, nk, d), (qf, kf, pv), options, limit) = item
    torch.cuda.set_device(0)
    dtype = torch.bfloat16 if index % 2 and qf != "fp16" else torch.float16
    g = torch.Generator(device="cuda").manual_seed(index)
    new = lambda n, h: torch.randn(b, n, h, d, device="cuda", generator=g).to(dtype).transpose(1, 2)
    offset = 2 * torch.randn(1, hk, 1, d, device="cuda", generator=g).to(dtype)
    q, k, v = new(nq, hq), new(nk, hk) + offset, new(nk, hk) + 0.5
    try:
        worst = lse_error = 0.0
        for varlen in (False, True):
            if varlen:
                b = 1
                cu = lambda n: torch.tensor([0, n // 3, n // 3, n], dtype=torch.int32, device="cuda")
                cu_q, cu_k = cu(nq), cu(nk)
                q, k, v = q[:1], k[:1], v[:1]
                if nq < 3 or (options.get("causal") and nq > nk):
                    break
                spans = [(0, nq // 3, 0, nk // 3), (nq // 3, nq, nk // 3, nk)]
                case = Case(q, k, v, qf, pv, kf=kf, cu_q=cu_q, cu_k=cu_k, **options)
            else:
                spans = [(0, nq, 0, nk)]
                case = Case(q, k, v, qf, pv, kf=kf, **options)
            case.quantize()
            case.attend()
            for i in range(b):
                for q0, q1, k0, k1 in spans:
                    ref, lse = exact_rows(q[i, :, q0:q1], k[i, :, k0:k1], v[i, :, k0:k1], torch.arange(q1 - q0, device="cuda"),
                                          case.causal)
                    worst = max(worst, relative_l1(case.out[i, :, q0:q1], ref))
                    got = (case.lse if varlen else case.lse[i])[:, q0:q1]
                    seen = torch.isfinite(lse)
                    same = bool((torch.isfinite(got) == seen).all())
                    lse_error = max(lse_error, (got - lse)[seen].abs().mean().item() if same else math.inf)
        ok = worst < limit and lse_error < limit
        return name, worst, lse_error, ok, ""
    except Exception as e:  # noqa: BLE001
        return name, math.inf, math.inf, False, repr(e)[-300:]


def flash_ms(q, k, v, bench, backend):
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return bench(lambda: F.scaled_dot_product_attention(q, k, v))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--quick", action="store_true", help="first tile of each precision only")
    parser.add_argument("--table", action="store_true", help="fewer precisions, the tuning table's tiles and few rivals only")
    options = parser.parse_args()
    began = time.time()
    import torch

    chosen = with_table(RIVALS if options.table else TILES, torch.cuda.get_device_capability())
    jobs = [(key, tile) for key, tiles in chosen.items() for tile in tiles[:1 if options.quick else None]]
    results, good = [], set()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        warming = pool.imap_unordered(warm, jobs)
        checking = pool.imap_unordered(check, list(enumerate(CHECKS)))
        for _ in jobs:
            (key, tile), error, seconds, message = warming.next(timeout=120)
            limit = LIMITS[f"{key[0]}+{key[1]}"]
            if error <= limit * 1.3:
                good.add((key, tile))
            else:
                print(f"WRONG {key} {tile}: relative L1 {error:.4f} (limit {limit}) {message}")
            results.append(dict(kind="warm", key=key, tile=tile, error=error, seconds=seconds, message=message))
        failures = 0
        for _ in CHECKS:
            name, error, lse_error, ok, message = checking.next(timeout=120)
            results.append(dict(kind="check", name=name, error=error, lse_error=lse_error, ok=ok, message=message))
            if not ok:
                failures += 1
                print(f"FAILED {name}: relative L1 {error:.4f}, lse {lse_error:.2e} {message}")
    right = f"checks: {len(CHECKS) - failures}/{len(CHECKS)}; tiles right: {len(good)}/{len(jobs)}"
    print(f"{right}; {time.time() - began:.0f} s", flush=True)

    import triton

    bench = lambda f: triton.testing.do_bench(f, warmup=15, rep=80, return_mode="median")
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for shape in ANCHORS:
        b, h, n, d = shape
        q, k, v = make_inputs(shape)
        reference = anchor_reference(q, k, v)
        tflops = lambda ms, b=b, h=h, n=n, d=d: 4 * b * h * n * n * d / ms / 1e9
        fa2 = flash_ms(q, k, v, bench, "FLASH_ATTENTION")
        row = dict(kind="baseline", shape=shape, fa2_ms=fa2)
        print(f"\n{shape}: FA2 {tflops(fa2):.0f}", end="")
        try:
            row["cudnn_ms"] = flash_ms(q, k, v, bench, "CUDNN_ATTENTION")
            print(f", cuDNN {tflops(row['cudnn_ms']):.0f}", end="")
        except RuntimeError as e:
            print(f", cuDNN not available ({str(e)[:60]})", end="")
        print(" TFLOP/s")
        results.append(row)
        size = q.numel() * 2
        for qf, pv, dim in chosen:
            if dim != d:
                continue
            case = Case(q, k, v, qf, pv)
            case.quantize()
            if not case.exact:
                steps = [("stats", case.stats, size * (2 if pv == "fp8" else 1) + (size if case.smooth_q else 0)),
                         ("K", case.quant_k, size + case.kc.numel()), ("Q", case.quant_q, size + case.qc.numel())]
                if pv == "fp8":
                    steps.append(("V", case.quant_v, size + case.vc.numel()))
                times = {name: bench(f) for name, f, _ in steps}
                text = " ".join(f"{s} {times[s] * 1e3:.0f}us {byte / times[s] / 1e6:.0f}GB/s" for s, f, byte in steps)
                if options.table:
                    times.update(quantiser_variants(case, bench))
                times["all"] = bench(case.quantize)
                least = sum(byte for _, _, byte in steps) / MEMORY_GB_PER_S / 1e6
                ratio = f"{times['all'] / least:.2f}x its bytes at {MEMORY_GB_PER_S} GB/s"
                print(f"  {case.names():10s} quantise: {text} all {times['all'] * 1e3:.0f}us, {ratio}")
                results.append(dict(kind="quantize", shape=shape, name=case.names(), ms=times))
            best = None
            for tile in chosen[qf, pv, dim]:
                if ((qf, pv, dim), tile) not in good:
                    continue
                case.out.fill_(float("nan"))
                case.attend(tile)
                error = anchor_error(case, reference)
                ms = bench(lambda case=case, tile=tile: case.attend(tile))
                results.append(dict(kind="tile", shape=shape, name=case.names(), tile=tile, ms=ms, error=error))
                note = "" if error <= LIMITS[case.names()] else " OVER LIMIT"
                speed = f"{ms:7.3f} ms {tflops(ms):6.0f} TFLOP/s"
                print(f"  {case.names():10s} {str(tile):34s} {speed}  l1 {error:.4f}{note}", flush=True)
                if best is None or ms < best[0]:
                    best = (ms, tile)
            if best is None:
                continue

            def total(case=case, tile=best[1]):
                case.quantize()
                case.attend(tile)

            ms = bench(total)
            results.append(dict(kind="total", shape=shape, name=case.names(), tile=best[1], ms=ms, over_fa2=fa2 / ms))
            speed = f"{ms:.3f} ms {tflops(ms):.0f} TFLOP/s = {fa2 / ms:.2f}x FA2"
            print(f"  {case.names():10s} TOTAL with {best[1]}: {speed}", flush=True)
            del case
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, "probe_portable.json"), "w") as f:
        json.dump(results, f, default=str, indent=0)
    print(f"done in {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
