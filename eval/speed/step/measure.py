"""Steps checked, then timed in turns: one model, all methods, eager and compiled."""
from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

import lowbit_video
from lowbit_video.hook.report import attention_modules

from .. import accuracy, timing
from .methods import EXACT, NONE, Method, methods_of, title, why_not
from .models import StepModel

MODES = ("eager", "blocks", "model")
"""As it is; its repeated blocks compiled; the whole model compiled. Compiled graphs are without a break (`fullgraph=True`)."""
FLOOR_DB = {"exact": 25.0, "low bit": 10.0}
"""Least accepted SQNR of a whole step beside PyTorch's own, eager: 16-bit types round hundreds of times on the way."""


def measure(name: str, entry: StepModel, methods: Sequence[str], modes: Sequence[str], device: str, tiny: bool,
            budget_ms: float, say: Callable[[str], None], save: Callable[[dict], None]) -> dict[str, Any]:
    """What `bench step` writes of one model; `save` gets it after each mode. A method that fails is told, not timed."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, given = entry.make(device, dtype, tiny)
    tokens = entry.tokens(model.config, tiny)
    left_out = {method: reason for method in methods if (reason := why_not(method, device, entry.fuses))}
    names = [method for method in methods if method not in left_out]
    result: dict[str, Any] = dict(model=name, batch=entry.batch, video_tokens=tokens, dtype=str(dtype).removeprefix("torch."),
                                  layers=len(attention_modules(model)), left_out=left_out, failed={}, rows=[], ran={})
    leading_keys = None if entry.text is None else tokens + entry.text
    with methods_of(model, entry.dispatches, names, leading_keys) as ways:
        steps = {method: _step(model, given, way) for method, way in ways.items()}
        wanted = next(iter(steps.values()))()
        eager: dict[str, torch.Tensor] = {}
        for mode in modes:
            torch._dynamo.reset()
            counters.clear()
            _compile(model, mode, "inductor" if device == "cuda" else "eager")
            rows = []
            for method, step in steps.items():
                try:
                    rows.append(_checked(method, mode, step, wanted, eager, device))
                    say(f"checked {title(method)}, {mode}: {rows[-1]['sqnr_db']:.1f} dB")
                except Exception as error:  # noqa: BLE001 - the result says what failed
                    result["failed"][f"{method}, {mode}"] = f"{type(error).__name__}: {error}"[:600]
                    say(f"failed {title(method)}, {mode}: {error!r}"[:1500])
            _time(rows, steps, device, budget_ms)
            _compare(rows, say)
            result["rows"] += rows
            for way in ways.values():
                way.put()  # the report is of the processors that are there
                result["ran"] |= lowbit_video.coverage(model).variants()
            save(result)
    del model, given, steps
    gc.collect()
    return result


def _step(model: Any, given: dict, way: Method) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        with torch.no_grad(), way.active():
            return model(**given, return_dict=False)[0]

    return step


def _compile(model: Any, mode: str, backend: str) -> None:
    """In place, so that a method's processors and backends are the model's own."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for module in model.modules():
        module._compiled_call_impl = None
    if mode == "blocks":
        for block in (block for part in model.children() if isinstance(part, torch.nn.ModuleList) for block in part):
            block.compile(fullgraph=True, backend=backend)  # blocks of a kind share a graph; CogVideoX names none as repeated
    elif mode == "model":
        model.compile(fullgraph=True, backend=backend)


def _checked(method: str, mode: str, step: Callable, wanted: torch.Tensor, eager: dict, device: str) -> dict[str, Any]:
    """A row with what was checked; raises AssertionError where a step is wrong."""
    graphs = counters["stats"]["unique_graphs"]
    begin = time.perf_counter()
    out = step()
    row: dict[str, Any] = dict(method=method, mode=mode, sqnr_db=sqnr_db(out, wanted))
    row["first_call_s"] = round(time.perf_counter() - begin, 2)
    row["graphs"] = counters["stats"]["unique_graphs"] - graphs
    assert torch.isfinite(out).all(), "the prediction is not finite"
    floor = -math.inf if method == NONE else FLOOR_DB["exact" if method in EXACT else "low bit"]
    assert row["sqnr_db"] >= floor, f"{row['sqnr_db']:.1f} dB beside PyTorch's own attention, wanted {floor}"
    if mode == "eager":
        eager[method] = out
    else:
        breaks = dict(counters["graph_break"])
        assert not breaks, f"broken by {breaks}"
        if method in eager:
            row["sqnr_to_eager_db"] = sqnr_db(out, eager[method])
            assert row["sqnr_to_eager_db"] >= floor, f"{row['sqnr_to_eager_db']:.1f} dB beside itself in eager mode"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def sqnr_db(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal to noise in dB; infinite for equal tensors."""
    return accuracy.sqnr_db(*(x.double().cpu().numpy() for x in (value, wanted)))


def _time(rows: list[dict], steps: dict[str, Callable], device: str, budget_ms: float) -> None:
    """Fills in medians and percentiles of what held, taken in turns."""
    calls = {row["method"]: steps[row["method"]] for row in rows}
    if not calls:
        return
    if device == "cuda":
        from lowbit_video.runtime import torch_runtime

        times = timing.time_together(timing.Timer(torch_runtime, torch.empty(1, device=device)), calls, budget_ms=budget_ms)
    else:
        samples: dict[str, list[float]] = {method: [] for method in calls}
        for _ in range(timing.LEAST_ROUNDS):
            for method, call in calls.items():
                begin = time.perf_counter()
                call()
                samples[method].append((time.perf_counter() - begin) * 1e3)
        times = {method: timing.summarise(own) for method, own in samples.items()}
    for row in rows:
        taken = times[row["method"]]
        row.update(median_ms=taken.median_ms, low_ms=taken.low_ms, high_ms=taken.high_ms, runs=taken.runs)


def _compare(rows: list[dict], say: Callable[[str], None]) -> None:
    """Fills in speed-ups over the mode's fastest exact method, and attention's share: what a step takes beyond no attention."""
    best = min((row["median_ms"] for row in rows if row["method"] in EXACT), default=None)
    without = next((row["median_ms"] for row in rows if row["method"] == NONE), None)
    for row in rows:
        row["speedup_over_exact"] = best / row["median_ms"] if best else None
        row["attention_share"] = 1 - without / row["median_ms"] if without else None
        say(f"{title(row['method']):<18}{row['mode']:<8}{row['median_ms']:10.2f} ms"
            + (f"  {row['speedup_over_exact']:.3f}x of the best exact" if best else ""))
