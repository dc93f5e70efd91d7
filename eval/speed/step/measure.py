"""Steps checked, then timed in turns: one model, all methods, eager and compiled."""
from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import lowbit_video
from lowbit_video.hook.report import attention_modules
from lowbit_video.runtime.detect import runtime_of

from .. import accuracy, timing
from . import parts
from .names import EXACT, NONE, fuses, title
from .side import Side

FLOOR_DB = {"exact": 25.0, "low bit": 10.0}
"""Least accepted SQNR of a whole step beside the first method's, eager: 16-bit types round hundreds of times on the way."""


def measure(side: Side, name: str, methods: Sequence[str], modes: Sequence[str], tiny: bool, budget_ms: float,
            say: Callable[[str], None], save: Callable[[dict], None], profile: bool = False) -> dict[str, Any]:
    """What `bench step` writes of one model; `save` gets it after each mode. A method that fails is told, not timed.

    profile: also by part of the model, in eager mode.
    """
    entry = side.entry(name)
    model, given = side.make(entry, tiny)
    tokens = entry.tokens(model.config, tiny)
    left_out = {method: reason for method in methods if (reason := side.why_not(method, entry))}
    if profile and not entry.fuses:
        left_out["profile"] = "its parts are those of CogVideoX"
    left_out |= {f"mode {mode}": reason for mode in modes if (reason := side.modes[mode])}
    dtype = next(runtime_of(x).dtype_name(x) for x in model.parameters())
    result: dict[str, Any] = dict(framework=side.name, model=name, batch=entry.batch, video_tokens=tokens, dtype=dtype,
                                  layers=len(attention_modules(model)), left_out=left_out, failed={}, rows=[], ran={})
    names = [method for method in methods if method not in left_out]
    with side.methods_of(model, entry, names, None if entry.text is None else tokens + entry.text) as ways:
        steps = {method: side.step(model, given, way) for method, way in ways.items()}
        wanted, eager = _wanted(steps, result, say), {}
        for mode in [mode for mode in modes if f"mode {mode}" not in left_out and wanted is not None]:
            rows = []
            side.begin_mode(model, mode)
            for method, step in steps.items():
                try:
                    rows.append(_checked(side, method, mode, step, wanted, eager))
                    say(f"checked {title(method)}, {mode}: {rows[-1]['sqnr_db']:.1f} dB")
                except Exception as error:  # noqa: BLE001 - the result says what failed
                    result["failed"][f"{method}, {mode}"] = f"{type(error).__name__}: {error}"[:600]
                    say(f"failed {title(method)}, {mode}: {error!r}"[:1500])
            try:
                _time(side, rows, steps, budget_ms)
                _compare(rows, say)
                result["rows"] += rows
            except Exception as error:  # noqa: BLE001
                result["failed"][f"timing, {mode}"] = f"{type(error).__name__}: {error}"[:600]
            if profile and mode == "eager" and entry.fuses:
                result["profiles"] = _profiles(side, model, {row["method"]: steps[row["method"]] for row in rows}, result, say)
            for way in ways.values():
                way.put()  # the report is of the processors that are there
                result["ran"] |= lowbit_video.coverage(model).variants()
            save(result)
    save(result)
    del model, given, steps
    gc.collect()
    return result


def _profiles(side: Side, model: Any, steps: dict[str, Callable], result: dict[str, Any], say: Callable[[str], None]
              ) -> list[dict[str, Any]]:
    """Where each method's time goes; what fails is told."""
    found = []
    for method, step in steps.items():
        try:
            found.append(parts.profile(side, model, method, step, fused=fuses(method)))
            say(f"parts of {title(method)}: {found[-1]['marked_ms']:.2f} ms, host {found[-1]['host_ms']:.2f} ms")
        except Exception as error:  # noqa: BLE001
            result["failed"][f"{method}, profile"] = f"{type(error).__name__}: {error}"[:600]
    return found


def _wanted(steps: dict[str, Callable], result: dict[str, Any], say: Callable[[str], None]) -> np.ndarray | None:
    """The prediction of the first method that has one, which the others are checked against; None where none has."""
    for method, step in list(steps.items()):
        try:
            return array(step())
        except Exception as error:  # noqa: BLE001 - the result says what failed
            del steps[method]
            result["failed"][method] = f"{type(error).__name__}: {error}"[:600]
            say(f"failed {title(method)}: {error!r}"[:1500])
    return None


def array(value: Any) -> np.ndarray:
    """A tensor's values on the host, float32."""
    return value if isinstance(value, np.ndarray) else runtime_of(value).to_numpy(value)


def sqnr_db(value: Any, wanted: Any) -> float:
    """Signal to noise in dB of tensors or arrays; infinite for equal ones."""
    return accuracy.sqnr_db(array(value), array(wanted))


def _checked(side: Side, method: str, mode: str, step: Callable, wanted: np.ndarray, eager: dict) -> dict[str, Any]:
    """A row with what was checked; raises AssertionError where a step is wrong."""
    graphs = side.graphs()
    begin = time.perf_counter()
    out = array(step())
    row: dict[str, Any] = dict(method=method, mode=mode, sqnr_db=sqnr_db(out, wanted))
    row["first_call_s"] = round(time.perf_counter() - begin, 2)
    if graphs is not None:
        row["graphs"] = side.graphs() - graphs
    assert np.isfinite(out).all(), "the prediction is not finite"
    floor = -math.inf if method == NONE else FLOOR_DB["exact" if method in EXACT else "low bit"]
    assert row["sqnr_db"] >= floor, f"{row['sqnr_db']:.1f} dB beside the first method's prediction, wanted {floor}"
    if mode == "eager":
        eager[method] = out
    else:
        breaks = side.breaks()
        assert not breaks, f"broken by {breaks}"
        if method in eager:
            row["sqnr_to_eager_db"] = sqnr_db(out, eager[method])
            assert row["sqnr_to_eager_db"] >= floor, f"{row['sqnr_to_eager_db']:.1f} dB beside itself in eager mode"
    if (peak := side.peak_gib(step)) is not None:
        row["peak_gib"] = peak
    return row


def _time(side: Side, rows: list[dict], steps: dict[str, Callable], budget_ms: float) -> None:
    """Fills in medians and percentiles of what held, taken in turns."""
    calls = {row["method"]: steps[row["method"]] for row in rows}
    if not calls:
        return
    if side.device != "cpu":
        like = side.like()
        times = timing.time_together(timing.Timer(runtime_of(like), like), calls, budget_ms=budget_ms)
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
