"""Speed and error of every attention kernel on this GPU, beside exact attention, in one run.

Each row is checked against float32 before it is timed. Totals count quantisation and everything else a
call does on the device. Methods of one shape are timed in turns, each run from a cold L2 cache.
"""
from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowbit_video.engine.gpu import Call
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.workspace import layout_workspace
from lowbit_video.files import write_json, write_whole
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, get_format
from lowbit_video.kernels.variants import VARIANTS, KernelVariant, Request
from lowbit_video.precision import EXACT_SPECS, Precision, names_recipe
from lowbit_video.rung import parts_of_rung
from lowbit_video.runtime import cuda_driver

from ..compare import settings
from . import accuracy, baselines, inputs, timing
from .shapes import Shape

SPECS = ("int8+fp16", "int8+fp8", "fp8+fp8", "int8/int4+fp16", "int8/int4+fp8", "int4+fp16", "int4+fp8", "int8/int2+fp16",
         "int2+fp16")
"""Precisions that are timed unless others are named."""
QUICK_SPECS = ("int8+fp16", "int8+fp8")
SANE_L1 = {"int8": 0.03, "fp8": 0.06, "int4": 0.25, "int2": 0.7}
"""Relative L1 (by the coarser of Q and K) above which a row counts as wrong and is not timed; FP8 P.V may add PV_L1."""
PV_L1 = 0.03
EXACT_L1 = 0.01
SHORT = 2048
"""Tokens to which shapes are shortened where kernels are only to be compiled: a multiple of every tile's."""
PACKAGES = {"triton": ["triton"], "torch": ["torch"], "paddle": ["paddlepaddle-gpu", "paddlepaddle"], "numpy": ["numpy"],
            "diffusers": ["diffusers"], "sageattention": ["sageattention"], "flash-attn-4": ["flash-attn-4"]}
"""What is recorded of a run's environment, and the distributions that have it."""
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
HOST_CALLS = 400
"""Warm calls, at most, over which the host's part is the median; as many times its allocations are made alone."""


@dataclasses.dataclass
class Row:
    """One method on one shape. Times in ms (median; low, high: 10th and 90th percentile); None where it does not apply.

    host_us: the host's part of a warm call. allocations: tensors that such a call asks its framework for; alloc_us: what the
    host takes for these alone, which is a part of host_us.
    """

    shape: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    causal: bool
    dtype: str
    framework: str
    method: str
    precision: str | None = None
    variant: str | None = None
    total_ms: float | None = None
    total_low_ms: float | None = None
    total_high_ms: float | None = None
    kernel_ms: float | None = None
    quant_ms: float | None = None
    quant_gb_s: float | None = None
    tflops: float | None = None
    kernel_tflops: float | None = None
    speedup: float | None = None
    sqnr_db: float | None = None
    relative_l1: float | None = None
    relative_l1_v_plus_1: float | None = None
    extra_mib: float | None = None
    host_us: float | None = None
    allocations: int | None = None
    alloc_us: float | None = None
    first_call_ms: float | None = None
    runs: int = 0
    error: str | None = None


@dataclasses.dataclass
class _Method:
    name: str
    call: Callable[[], Any]
    runtime: Any
    spec: str | None = None
    variant: KernelVariant | None = None
    attend: Callable[[], Any] | None = None
    quantise: Callable[[], Any] | None = None
    call_v1: Callable[[], Any] | None = None
    limit: float = EXACT_L1


def request_for(shape: Shape, precision: Precision, dtype: str, arch: tuple[int, int], kv_heads: int | None = None) -> Request:
    """What selection would be asked for this shape and precision."""
    exact = FORMAT_OF_DTYPE[dtype]
    q, k, pv = (exact, exact, exact) if precision.exact else (precision.q, precision.k, precision.pv)
    return Request(device="cuda", arch=arch, q=q, k=k, pv=pv, granularity=precision.granularity, dtype=dtype,
                   head_dim=shape.head_dim, q_len=shape.tokens, kv_len=shape.tokens, heads=shape.heads,
                   kv_heads=kv_heads or shape.heads, smooth_q=precision.smooth_q, rotate=precision.rotate,
                   causal=shape.causal)


def fitting(shape: Shape, precision: Precision, dtype: str, arch: tuple[int, int]) -> list[KernelVariant]:
    """The GPU variants that serve this shape and precision on this arch, in table order."""
    request = request_for(shape, precision, dtype, arch)
    return [v for v in VARIANTS if v.device == "cuda" and v.why_not(request) is None]


def quantisation_bytes(shape: Shape, precision: Precision, dtype: str) -> int:
    """Bytes that quantisation must move: inputs once a pass (statistics need one of their own), copies once."""
    batch, heads, tokens, head_dim = shape.dims
    elements, size = batch * heads * tokens * head_dim, BYTES[dtype]
    q_reads, k_reads = (1 + (smooth or precision.rotate) for smooth in (precision.smooth_q, precision.smooth_k))
    v_reads = 2 * (precision.pv == "fp8")
    codes = sum(elements // get_format(name).codes_per_byte for name in (precision.q, precision.k))
    return elements * size * (q_reads + k_reads + v_reads) + codes + (elements if precision.pv == "fp8" else 0)


def _call_counting_memory(method: _Method, out_bytes: int) -> tuple[Any, float | None]:
    """What a call returns, and the MiB of device memory it took beyond that, by the framework's own count."""
    if method.runtime.NAME != "torch":
        return method.call(), None
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = method.call()
    return out, max(0, torch.cuda.max_memory_allocated() - before - out_bytes) / 2**20


def allocations_of(call: Callable[[], Any], runtime: Any) -> list[tuple[tuple[int, ...], str, Any]]:
    """What a call allocates by `runtime.empty`, in its order: shape, dtype name, and the tensor beside which it lies.

    Of attention that is its output, its LSE where it is asked for, and but for exact attention its workspace.
    """
    asked, empty = [], runtime.empty

    def noted(shape: Sequence[int], dtype: str, like: Any) -> Any:
        asked.append((tuple(shape), dtype, like))
        return empty(shape, dtype, like)

    runtime.empty = noted
    try:
        call()
    finally:
        runtime.empty = empty
    return asked


def _methods(shape: Shape, dtype: str, runtime: Any, like: Any, specs: Iterable[str], wanted: Callable[[str, str], bool],
             with_baselines: bool) -> tuple[list[_Method], list[tuple[str, str]], Any]:
    from lowbit_video.api import attention

    q, k, v = inputs.make_inputs(runtime, shape.dims, dtype, like)
    v1 = runtime.empty(shape.dims, dtype, like)
    with runtime.launch_guard(v1):
        inputs.fill_normal(v1, shape.dims, 2001, 1.0)
    scale = shape.head_dim**-0.5
    arch = runtime.arch(q)
    methods, missing = [], []
    for baseline in baselines.BASELINES if with_baselines else ():
        if baseline.framework == "paddle" != runtime.NAME:
            continue
        reason = baseline.why_not()
        if reason is not None:
            missing.append((baseline.name, reason))
            continue
        if not wanted(baseline.name, ""):
            continue
        b_runtime, tensors = runtime, (q, k, v)
        if baseline.framework != runtime.NAME:
            from lowbit_video.runtime import detect

            anchor = detect.anchor("torch")
            b_runtime = detect.runtime_of(anchor)
            tensors = inputs.make_inputs(b_runtime, shape.dims, dtype, anchor)
        methods.append(_Method(baseline.name, baseline.make(*tensors, shape.causal), b_runtime,
                               limit=SANE_L1["int8"] if "Sage" in baseline.name else EXACT_L1))
    for spec in specs:
        precision = Precision(spec)
        for variant in fitting(shape, precision, dtype, arch):
            if not wanted(spec, variant.name):
                continue
            run = lambda v, spec=spec, backend=variant.backend: attention(
                q, k, v, spec, tensor_layout="HND", is_causal=shape.causal, scale=scale, backend=backend)
            method = _Method(f"{spec} ({variant.name})", lambda run=run: run(v), runtime, spec, variant)
            if precision.exact:
                method.name = f"exact ({variant.name})"
            else:
                one = call_for(variant, precision, shape, runtime, q, k, v)
                method.attend, method.quantise = guarded(runtime, q, one.attend), guarded(runtime, q, one.quantise)
                method.call_v1 = lambda run=run: run(v1)
                method.limit = max(SANE_L1[precision.q], SANE_L1[precision.k]) + (PV_L1 if precision.pv == "fp8" else 0)
            methods.append(method)
    return methods, missing, (q, k, v, v1)


def call_for(variant: KernelVariant, precision: Precision, shape: Shape, runtime: Any, q: Any, k: Any, v: Any,
             config: Any = None) -> Call:
    """A call of a variant on [B, H, N, D] tensors whose quantisation and kernel can be launched apart; config: the kernel's."""
    options = AttentionOptions(precision, "HND", shape.causal, shape.head_dim**-0.5)
    return Call(variant, options, q, k, v, runtime=runtime, config=config)


def guarded(runtime: Any, like: Any, launch: Callable[[], None]) -> Callable[[], None]:
    """The launch inside the runtime's `launch_guard`."""
    def call():
        with runtime.launch_guard(like):
            launch()

    return call


def bench_shape(shape: Shape, *, framework: str, dtype: str = "float16", specs: Iterable[str] = SPECS,
                wanted: Callable[[str, str], bool] = lambda spec, variant: True, with_baselines: bool = True,
                budget_ms: float = 400.0, totals_only: bool = False,
                log: Callable[[str], None] = lambda text: None) -> list[Row]:
    """All rows of one shape: checked, then timed in turns. totals_only: the kernel and quantisation are not timed apart."""
    from lowbit_video.runtime import detect

    like = detect.anchor(framework)
    runtime = detect.runtime_of(like)
    timer = timing.Timer(runtime, like)
    methods, missing, (q, k, v, v1) = _methods(shape, dtype, runtime, like, ("exact", *specs), wanted, with_baselines)
    for name, reason in missing:
        log(f"  {name}: left out, {reason}")
    scale = shape.head_dim**-0.5
    want = accuracy.reference(runtime, q, k, v, scale=scale, causal=shape.causal)
    want_v1 = accuracy.reference(runtime, q, k, v1, scale=scale, causal=shape.causal)
    rows, good = [], []
    for method in methods:
        row = Row(shape.name, *shape.dims, shape.causal, dtype, method.runtime.NAME, method.name, method.spec,
                  method.variant.name if method.variant else None)
        rows.append(row)
        try:
            row.first_call_ms = timer.first_call_ms(method.call)
            out_bytes = shape.batch * shape.heads * shape.tokens * shape.head_dim * BYTES[dtype]
            out, row.extra_mib = _call_counting_memory(method, out_bytes)
            row.relative_l1, row.sqnr_db = accuracy.errors(method.runtime, out, want)
            if method.call_v1:
                row.relative_l1_v_plus_1 = accuracy.errors(runtime, method.call_v1(), want_v1)[0]
            del out
            if not row.relative_l1 < method.limit:
                row.error = f"relative L1 {row.relative_l1:.4f} is not under {method.limit}: wrong, hence not timed"
            if row.extra_mib is None and method.spec and not Precision(method.spec).exact:
                row.extra_mib = layout_workspace(shape.dims, shape.dims, Precision(method.spec), False).size / 2**20
        except Exception as error:  # one method's failure must not lose the others' rows
            row.error = f"{type(error).__name__}: {error}"[:400]
            timer.synchronize()
        if row.error:
            log(f"  {method.name}: {row.error}")
        else:
            good.append((method, row))
    calls: dict[str, Callable[[], Any]] = {}
    for method, _ in good:
        calls[method.name] = method.call
        if totals_only:
            method.attend = None
        if method.attend:
            calls[method.name + "|kernel"], calls[method.name + "|quant"] = method.attend, method.quantise
            method.quantise()
    times = timing.time_together(timer, calls, budget_ms=budget_ms)
    for method, row in good:
        total = times[method.name]
        row.total_ms, row.total_low_ms, row.total_high_ms, row.runs = total.median_ms, total.low_ms, total.high_ms, total.runs
        row.host_us, row.tflops = timer.host_us(method.call, HOST_CALLS), shape.flops / total.median_ms / 1e9
        if method.attend:
            row.kernel_ms, row.quant_ms = times[method.name + "|kernel"].median_ms, times[method.name + "|quant"].median_ms
            row.kernel_tflops = shape.flops / row.kernel_ms / 1e9
            row.quant_gb_s = quantisation_bytes(shape, Precision(method.spec), dtype) / row.quant_ms / 1e6
        if method.variant:
            made = allocations_of(method.call, runtime)
            row.allocations = len(made)
            row.alloc_us = timer.host_us(lambda made=made: [runtime.empty(*one) for one in made], HOST_CALLS)
        log("  " + describe(row))
    base = next((r.total_ms for r in rows if r.method == baselines.FLASH_ATTENTION_2), None)
    for row in rows:
        row.speedup = base / row.total_ms if base and row.total_ms else None
    gc.collect()
    return rows


def precompile(shapes: Iterable[Shape], framework: str, dtype: str, specs: Iterable[str], jobs: int) -> float:
    """Compiles every kernel that these rows need, in `jobs` processes that share Triton's cache; returns the seconds taken."""
    begin = time.perf_counter()
    short = dict.fromkeys(dataclasses.replace(s, name="", batch=1, tokens=min(s.tokens, SHORT + s.tokens % SHORT))
                          for s in shapes)  # what a kernel is specialised on does not change by multiples of SHORT
    work = [(shape, framework, dtype, spec) for shape in short for spec in ("exact", *specs)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        pool.map(_compile_one, sorted(work, key=lambda job: -job[0].flops), chunksize=1)
    return time.perf_counter() - begin


def _compile_one(job: tuple[Shape, str, str, str]) -> None:
    from lowbit_video.api import attention
    from lowbit_video.runtime import detect

    shape, framework, dtype, spec = job
    like = detect.anchor(framework)
    runtime = detect.runtime_of(like)
    q, k, v = (runtime.empty(shape.dims, dtype, like) for _ in range(3))
    for variant in fitting(shape, Precision(spec), dtype, runtime.arch(like)):
        try:
            attention(q, k, v, spec, tensor_layout="HND", is_causal=shape.causal, backend=variant.backend)
        except Exception:  # noqa: S110  the row itself reports it
            pass
    cuda_driver.synchronize(runtime.stream(like))


def describe(row: Row) -> str:
    """One line about a row, for the log."""
    parts = [f"{row.method:34s} {row.total_ms:9.3f} ms [{row.total_low_ms:.3f}, {row.total_high_ms:.3f}] "
             f"{row.tflops:6.0f} TFLOP/s"]
    if row.kernel_ms:
        parts.append(f"kernel {row.kernel_ms:.3f} ms {row.kernel_tflops:.0f}, "
                     f"quantisation {row.quant_ms:.3f} ms {row.quant_gb_s:.0f} GB/s")
    parts.append(f"L1 {row.relative_l1:.4f}" + (f" (V+1 {row.relative_l1_v_plus_1:.4f})" if row.relative_l1_v_plus_1 else ""))
    apart = "" if row.alloc_us is None else f" ({row.allocations} allocations {row.alloc_us:.1f})"
    parts.append(f"host {row.host_us:.0f} us{apart}, first call {row.first_call_ms:.0f} ms")
    return ", ".join(parts)


def specs_for(filters: list[str] | None) -> tuple[str, ...]:
    """The precisions to run under `--variants`: those it names, else all."""
    named = tuple(text for text in filters or () if "+" in text)
    return named or SPECS


def specs_of(recipe: Recipe, log: Callable[[str], None]) -> tuple[str, ...]:
    """The low-bit precisions that a recipe's rungs are; exact ones are always timed, and those with pooled keys are told.

    Raises ValueError where all have pooled keys.
    """
    pooled = [rung for rung in recipe.rungs if parts_of_rung(rung)[1] is not None]
    how = ("of a kernel all keys are timed here: `lowbit-video bench step --recipe` times these in a model, and python -m "
           "lowbit_video.eval.speed.experiments.recipe_attention a recipe's attention by itself")
    if len(pooled) == len(recipe.rungs):
        raise ValueError(f"{recipe.source} keeps a share of the keys everywhere ({', '.join(pooled)}), and {how}")
    if pooled:
        log(f"{recipe.source}: left out {', '.join(pooled)}; {how}")
    return tuple(rung for rung in recipe.rungs if rung not in pooled and not Precision(rung).exact)


def environment(framework: str) -> dict[str, Any]:
    """GPU, versions and commit of a run."""
    from lowbit_video.runtime import detect

    like = detect.anchor(framework)
    runtime = detect.runtime_of(like)
    ordinal = cuda_driver.device_of_pointer(like.data_ptr()) or 0
    return dict(gpu=cuda_driver.device_name(ordinal), arch=list(runtime.arch(like) or ()), driver=cuda_driver.driver_version(),
                framework=framework, python=platform.python_version(), versions=package_versions(), commit=settings.commit())


def package_versions() -> dict[str, str]:
    """Versions of what is installed of the packages that a run may use."""
    found = {}
    for package, distributions in PACKAGES.items():
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(package, importlib.metadata.version(distribution))
    return found


COLUMNS = (("method", "method", "{}"), ("total ms", "total_ms", "{:.3f}"), ("kernel ms", "kernel_ms", "{:.3f}"),
           ("quant GB/s", "quant_gb_s", "{:.0f}"), ("TFLOP/s", "tflops", "{:.0f}"),
           ("kernel TFLOP/s", "kernel_tflops", "{:.0f}"), ("over FA-2", "speedup", "{:.2f}x"), ("SQNR dB", "sqnr_db", "{:.1f}"),
           ("rel. L1", "relative_l1", "{:.4f}"), ("rel. L1, V+1", "relative_l1_v_plus_1", "{:.4f}"),
           ("extra MiB", "extra_mib", "{:.0f}"), ("host us", "host_us", "{:.0f}"),
           ("alloc us", "alloc_us", "{:.1f}"))


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """The rows as Markdown, one table a shape."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"# Attention kernels on {about['gpu']}", "",
             f"Tensors: {about['framework']}. {versions}; driver {about['driver']}; commit {about['commit']}.", "",
             "Total counts quantisation. TFLOP/s = 4BHN²D / time. Medians from a cold L2 cache, methods timed in turns; the "
             "JSON beside this has the 10th and 90th percentiles. Errors are against float32 on sampled rows. Host: the host's "
             "part of a warm call; alloc: what allocating its output and workspace takes of that."]
    for key in dict.fromkeys((r.shape, r.batch, r.heads, r.tokens, r.head_dim, r.causal, r.dtype) for r in rows):
        name, *dims, causal, dtype = key
        lines += ["", f"## ({', '.join(map(str, dims))}) {name}{' causal' if causal else ''}, {dtype}", "",
                  "| " + " | ".join(title for title, *_ in COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
        for row in rows:
            if (row.shape, row.batch, row.heads, row.tokens, row.head_dim, row.causal, row.dtype) != key:
                continue
            if row.error:
                lines.append(f"| {row.method} | {row.error} |" + " |" * (len(COLUMNS) - 2))
                continue
            cells = [getattr(row, field) for _, field, _ in COLUMNS]
            texts = ("" if cell is None else form.format(cell) for cell, (_, _, form) in zip(cells, COLUMNS))
            lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def save(rows: list[Row], about: dict[str, Any], folder: Path, stem: str, plots: bool = True) -> list[Path]:
    """Writes STEM.json, STEM.md and, where matplotlib is installed, STEM.png; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    write_json(paths[0], dict(about=about, rows=[dataclasses.asdict(r) for r in rows]))
    with write_whole(paths[1]) as temporary:
        temporary.write_text(markdown(rows, about), encoding="utf-8")
    if plots and importlib.util.find_spec("matplotlib"):
        from . import plot

        paths.append(plot.plot_kernels(rows, about, folder / f"{stem}.png"))
    return paths


def chosen(filters: list[str] | None) -> Callable[[str, str], bool]:
    """A test of (precision or baseline, variant name) against filters, any of which may match either exactly or the variant's
    backend prefix ("hopper", "triton"). Exact attention and the baselines are always kept."""
    if not filters:
        return lambda spec, variant: True
    known = set(SPECS) | set(EXACT_SPECS) | {v.name for v in VARIANTS} | {v.backend for v in VARIANTS}
    for text in filters:
        try:
            Precision(text)
        except ValueError:
            if names_recipe(text):
                raise
            if text not in known:
                raise ValueError(f"no variant or precision {text!r}; there are: {', '.join(sorted(known))}") from None
    specs = {f for f in filters if "+" in f}
    names = set(filters) - specs
    return lambda spec, variant: (not variant or spec in EXACT_SPECS or
                                  ((not specs or spec in specs) and
                                   (not names or variant in names or variant.split("-")[0] in names)))
