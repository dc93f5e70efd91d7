"""Measures the tuning data of this GPU: tile shapes of the portable kernel, and shortest useful lengths.

Writes a JSON file of the form that `kernels/tuning.py` reads; the rows of its own table were made by this.
"""
from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit_video.engine.gpu import Call
from lowbit_video.files import write_whole
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.kernels import tuning
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
from lowbit_video.kernels.tuning import TileConfig
from lowbit_video.kernels.variants import KernelVariant
from lowbit_video.precision import Precision
from lowbit_video.rung import parts_of_rung
from lowbit_video.runtime import cuda_driver, detect

from . import accuracy, bench, inputs, timing
from .shapes import Shape

SPECS = ("int8+fp16", "int8+fp8", "fp8+fp8", "int4+fp16", "int4+fp8", "int2+fp16", "exact")
"""One precision for each tuning family."""
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
"""Tokens at which the crossover with exact attention is looked for."""
TILES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 128, 4))
"""Rows, keys and warps of the tiles to try up to head dim 128."""
CANDIDATES = tuple(TileConfig(block_m, block_n, num_warps, num_stages) for block_m, block_n, num_warps in TILES
                   for num_stages in (2, 3, 4))
SMALL_CANDIDATES = tuple(TileConfig(64, block_n, 4, num_stages) for block_n in (32, 64) for num_stages in (1, 2, 3))
"""Beyond head dim 128."""
FLOAT32_CANDIDATES = tuple(TileConfig(*tile, num_stages) for tile in ((16, 32, 8), (32, 32, 4), (64, 32, 4), (64, 64, 4))
                           for num_stages in (1, 2, 3))
"""For float32 tensors, which fill shared memory and registers sooner."""


def candidates(head_dim: int, dtype: str) -> tuple[TileConfig, ...]:
    """The tiles to try at a head dim, for tensors of a dtype."""
    if dtype == "float32":
        return FLOAT32_CANDIDATES
    return CANDIDATES if head_dim <= 128 else SMALL_CANDIDATES


def chosen_specs(specs: Sequence[str] | None, dtype: str) -> tuple[str, ...]:
    """The precisions to tune with tensors of a dtype; None: one for each family that its tensors have tiles in.

    Exact attention in float32 has a family of its own. Low-bit tiles and lengths belong to 16-bit tensors, and float32 ones
    use the same. Raises ValueError for precisions whose rows would say something else than was measured.
    """
    own = FORMAT_OF_DTYPE[dtype]
    chosen = tuple(specs or (("exact",) if own == "fp32" else SPECS))
    for spec in chosen:
        precision = Precision(spec)
        if precision.exact and spec not in ("exact", own):
            raise ValueError(f"{spec} cannot be tuned with {dtype} tensors: exact attention runs in their own format; pass "
                             f"'exact', and the dtype that {spec} is stored in")
        if own == "fp32" and not precision.exact:
            raise ValueError(f"{spec} cannot be tuned with float32 tensors: its rows are those of 16-bit tensors, which "
                             "float32 ones share; pass float16 or bfloat16, or tune 'exact'")
    return chosen


def specs_of(recipe: Recipe, log: Callable[[str], None]) -> tuple[str, ...]:
    """The precisions of a recipe's rungs, each once; of those with pooled keys it is told whose tiles they take."""
    parts = {rung: parts_of_rung(rung) for rung in recipe.rungs}
    for rung, (spec, pooled) in parts.items():
        if pooled is not None:
            log(f"{recipe.source}: {rung} has no tiles or lengths of its own; those of {spec} serve it")
    return tuple(dict.fromkeys(spec for spec, _ in parts.values()))


def family_of(precision: Precision, dtype: str) -> str:
    """The tuning family whose tile a precision uses on tensors of a dtype."""
    if precision.exact:
        return tuning.family(*(FORMAT_OF_DTYPE[dtype],) * 3)
    return tuning.family(precision.q, precision.k, precision.pv)


def describe(config: Any) -> str:
    """How a kernel is built, in a few words."""
    if isinstance(config, TileConfig):
        more = f" registers {config.max_registers}" * bool(config.max_registers) + " sum_mma" * config.sum_mma
        return f"{config.block_m}x{config.block_n} warps {config.num_warps} stages {config.num_stages}{more}"
    return " ".join(f"{name} {value}" for name, value in asdict(config).items() if value)


def calls_of(shape: Shape, spec: str, backend: str, configs: Sequence[Any], framework: str, dtype: str,
             v_offset: float = 0.5) -> tuple[Any, list[tuple[Any, Call]], Any]:
    """The runtime, calls of a backend's kernel built by each of `configs`, none where it lacks `spec`, and q, k, v."""
    like = detect.anchor(framework)
    runtime, precision = detect.runtime_of(like), Precision(spec)
    fitting = bench.fitting(shape, precision, dtype, runtime.arch(like))
    variant = next((v for v in fitting if v.backend == backend), None)
    if variant is None:
        return runtime, [], None
    tensors = inputs.make_inputs(runtime, shape.dims, dtype, like, v_offset=v_offset)
    calls = [(config, bench.call_for(variant, precision, shape, runtime, *tensors, config=config)) for config in configs]
    return runtime, calls, tensors


def _compile(job: tuple[Shape, str, str, str, int]) -> None:
    shape, spec, framework, dtype, index = job
    runtime, calls, tensors = calls_of(shape, spec, "triton", [candidates(shape.head_dim, dtype)[index]], framework, dtype)
    for _, call in calls:
        try:
            call.run()
            cuda_driver.synchronize(runtime.stream(tensors[0]))
        except Exception:  # noqa: S110  a tile that does not compile or fit is reported when it is timed
            pass


def right_calls(shape: Shape, spec: str, backend: str, configs: Sequence[Any], framework: str, dtype: str,
                log: Callable[[str], None], limit: float | None = None, v_offset: float = 0.5
                ) -> tuple[Any, dict[str, tuple[Any, Call, float]], Any]:
    """Which of `configs` make a backend's kernel compute the right thing; the others are logged.

    Returns the runtime; by name each config with its call and relative L1; and q, k, v (None where the backend does not
    serve the precision). configs: `TileConfig`s ("triton") or `HopperConfig`s ("hopper"). limit: of the relative L1, None
    for the benchmark's.
    """
    runtime, calls, tensors = calls_of(shape, spec, backend, configs, framework, dtype, v_offset)
    if not calls:
        return runtime, {}, None
    want = accuracy.reference(runtime, *tensors, scale=shape.head_dim**-0.5, causal=shape.causal)
    precision = Precision(spec)
    if limit is None:
        sane = bench.SANE_L1
        limit = bench.EXACT_L1 if precision.exact else max(sane[precision.q], sane[precision.k]) + bench.PV_L1
    good: dict[str, tuple[Any, Call, float]] = {}
    for config, call in calls:
        name = describe(config)
        try:
            error = accuracy.errors(runtime, call.run(), want)[0]
        except Exception as failure:
            log(f"  {spec} {name}: {type(failure).__name__} {str(failure)[:120]}")
            continue
        if error < limit:
            good[name] = config, call, error
        else:
            log(f"  {spec} {name}: wrong, relative L1 {error:.4f}")
    return runtime, good, tensors


def fastest(shape: Shape, spec: str, backend: str, configs: Sequence[Any], framework: str, dtype: str,
            log: Callable[[str], None]) -> Any:
    """The fastest of `configs` for a precision at a shape, kernel only, among those that compute the right thing."""
    runtime, good, tensors = right_calls(shape, spec, backend, configs, framework, dtype, log)
    if not good:
        return None
    q = tensors[0]
    kernels = {name: bench.guarded(runtime, q, call.attend) for name, (_, call, _) in good.items()}
    times = timing.time_together(timing.Timer(runtime, q), kernels, budget_ms=60.0, max_runs=15)
    ranked = sorted(times, key=lambda name: times[name].median_ms)
    for name in ranked[:4]:
        log(f"  {spec} {shape} {name}: {times[name].median_ms:.3f} ms, {shape.flops / times[name].median_ms / 1e9:.0f} TFLOP/s")
    return good[ranked[0]][0]


def tune_tiles(shape: Shape, spec: str, framework: str, dtype: str, log: Callable[[str], None]) -> TileConfig | None:
    """The fastest tile of the portable kernel for a precision at a shape."""
    return fastest(shape, spec, "triton", candidates(shape.head_dim, dtype), framework, dtype, log)


def shortest_useful(spec: str, variant: KernelVariant, head_dim: int, framework: str, dtype: str) -> int:
    """The smallest of LENGTHS from which the variant, quantisation counted, beats exact attention, there and at longer ones.

    Exact attention is PyTorch's own on torch tensors, this project's exact kernel on Paddle's. Twice the longest length if
    it never does.
    """
    from lowbit_video.api import attention

    from . import baselines

    like = detect.anchor(framework)
    runtime = detect.runtime_of(like)
    answer = 2 * LENGTHS[-1]
    for tokens in reversed(LENGTHS):
        shape = Shape("", 2, 24, tokens, head_dim)
        q, k, v = inputs.make_inputs(runtime, shape.dims, dtype, like)
        flash = baselines.BASELINES[0]
        exact = (flash.make(q, k, v, False) if runtime.NAME == "torch" and flash.why_not() is None
                 else lambda q=q, k=k, v=v: attention(q, k, v, "exact", tensor_layout="HND"))
        low = lambda q=q, k=k, v=v: attention(q, k, v, spec, tensor_layout="HND", backend=variant.backend)
        exact(), low()
        # wall clock of the host counts here: a short call's launches are what makes it slow
        times = timing.time_together(timing.Timer(runtime, q), {"exact": exact, "low": low}, budget_ms=20.0)
        cost = {name: max(t.median_ms, t.host_us / 1e3) for name, t in times.items()}
        if cost["low"] >= cost["exact"]:
            break
        answer = tokens
    return answer


def tune(shapes: Iterable[Shape], *, framework: str, dtype: str, specs: Sequence[str] | None, out: Path, jobs: int = 0,
         lengths: bool = True, tiles: bool = True, log: Callable[[str], None] = print) -> Path:
    """Measures and writes the tuning file; returns its path. Raises ValueError for what `chosen_specs` refuses."""
    shapes, specs = tuple(shapes), chosen_specs(specs, dtype)
    if jobs and tiles:
        work = [(shape, spec, framework, dtype, index) for shape in shapes for spec in specs
                for index in range(len(candidates(shape.head_dim, dtype)))]
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            pool.map(_compile, work, chunksize=4)
    like = detect.anchor(framework)
    runtime = detect.runtime_of(like)
    arch = tuple(runtime.arch(like))
    entries: list[dict[str, Any]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        padded = tuning.padded_head_dim(shape.head_dim)
        for spec in specs:
            precision = Precision(spec)
            best = tune_tiles(shape, spec, framework, dtype, log) if tiles else None
            if best is not None:
                name = family_of(precision, dtype)
                entries = [e for e in entries if (e.get("family"), e["head_dim"]) != (name, padded)]
                entries.append(dict(family=name, arch=list(arch), head_dim=padded, config=asdict(best)))
            if lengths and not precision.exact:
                for variant in bench.fitting(shape, precision, dtype, arch):
                    key = dict(variant=variant.name, pv=precision.pv, arch=list(arch), head_dim=padded)
                    if any(all(entry.get(name) == value for name, value in key.items()) for entry in entries):
                        continue  # the variant's first precision stands for its others
                    tokens = shortest_useful(spec, variant, shape.head_dim, framework, dtype)
                    log(f"  {spec} {variant.name}, head dim {shape.head_dim}: beats exact attention from {tokens} tokens on")
                    entries.append(key | dict(faster_from=tokens))
            with write_whole(out) as temporary:
                temporary.write_text(json.dumps([dict(about=bench.environment(framework)), *entries], indent=1) + "\n")
    return out
