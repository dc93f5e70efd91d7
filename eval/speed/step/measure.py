"""Steps checked, then timed in turns: one model, all methods, eager and compiled."""
from __future__ import annotations

import copy
import functools
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import lowbit_video
from lowbit_video.hook.report import attention_modules
from lowbit_video.runtime.detect import runtime_of

from .. import accuracy, timing
from . import kernel_parts, parts
from .names import EXACT, NONE, fuses, title
from .side import Side

FLOOR_DB = {"exact": 25.0, "low bit": 10.0}
"""Least accepted SQNR of a whole step beside the first method's, eager: 16-bit types round hundreds of times on the way."""
SLOW_MS = 1000.0
"""A slower step is not run but to be checked and to be timed."""
PARTS_MS = 5000.0
"""A slower step is not run once more to tell its parts unless that is asked for."""


def measure(side: Side, name: str, methods: Sequence[str], modes: Sequence[str], tiny: bool, budget_ms: float,
            say: Callable[[str], None], save: Callable[[dict], None], profile: bool = False,
            rounds: int = timing.LEAST_ROUNDS, known: Mapping[str, Any] | None = None,
            left_s: Callable[[], float] = lambda: math.inf, all_parts: bool = False) -> dict[str, Any]:
    """What `bench step` writes of one model; `save` gets it after each check and, where steps are slow, each turn of timing.

    A method that fails is told, not timed, and so is a model that cannot be made.
    profile: also by part of the model, in eager mode. rounds: turns of every method, however slow.
    known: what an earlier call has of this model; what was timed there is taken as it is.
    left_s: how many seconds there are; no step that takes longer begins, and what was left out for it is told.
    all_parts: also of steps slower than PARTS_MS, where the device's time goes by kernel.
    """
    entry = side.entry(name)
    left_out = {method: reason for method in methods if (reason := side.why_not(method, entry))}
    if profile and not entry.fuses:
        left_out["profile"] = "its parts are those of CogVideoX"
    left_out |= {f"mode {mode}": reason for mode in modes if (reason := side.modes[mode])}
    if side.device != "cpu" and side.no_kernels:
        left_out["parts by kernel"] = side.no_kernels
    kept = {what: copy.copy(known[what]) for what in ("rows", "ran", "profiles") if what in known} if known else {}
    result: dict[str, Any] = dict(framework=side.name, model=name, batch=entry.batch, left_out=left_out, failed={},
                                  **dict(rows=[], ran={}) | kept)
    save(result)
    begin = time.perf_counter()
    try:
        model, given = side.make(entry, tiny)
    except Exception as error:  # noqa: BLE001 - the result says what failed
        _failed(result, "the model", error, say)
        save(result)
        return result
    tokens = entry.tokens(model.config, tiny)
    result |= dict(video_tokens=tokens, dtype=_dtype(model), layers=len(attention_modules(model)))
    say(f"made in {time.perf_counter() - begin:.1f} s: {tokens} tokens, batch {entry.batch}, {result['layers']} layers")
    names = [method for method in methods if method not in left_out]
    with side.methods_of(model, entry, names, None if entry.text is None else tokens + entry.text) as ways:
        steps = {method: side.step(model, given, way) for method, way in ways.items()}
        first, eager = _first(side, steps, result, say), {}
        for mode in [mode for mode in modes if f"mode {mode}" not in left_out and first is not None]:
            _mode(side, model, mode, steps, first, eager, Budget(budget_ms, rounds, left_s, all_parts), result, say, save)
            if profile and mode == "eager" and entry.fuses:
                timed = {row["method"]: steps[row["method"]] for row in result["rows"] if row["mode"] == mode
                         and row["method"] in steps}
                result["profiles"] = _profiles(side, model, timed, result, say)
            for way in ways.values():
                way.put()  # the report is of the processors that are there
                result["ran"] |= lowbit_video.coverage(model).variants()
            save(result)
    save(result)
    del model, given, steps
    gc.collect()
    return result


def _dtype(model: Any) -> str:
    """That of most of a model's weights: some keep a few of theirs in float32."""
    numbers: Counter[str] = Counter()
    for parameter in model.parameters():
        numbers[runtime_of(parameter).dtype_name(parameter)] += math.prod(parameter.shape)
    return numbers.most_common(1)[0][0]


@dataclass(frozen=True)
class Prediction:
    """What a step gave, on the host in float32.

    seconds: until it was there. peak_gib: of the device's memory, graphs: compiled for it, each None where it is not told.
    """

    method: str
    values: np.ndarray
    seconds: float
    peak_gib: float | None
    graphs: int | None


@dataclass(frozen=True)
class Budget:
    """device_ms: of the slowest method's runs. rounds: turns of each at least. left_s: seconds until no step may run.

    all_parts: steps slower than PARTS_MS, too, are run once more to tell their parts.
    """

    device_ms: float
    rounds: int
    left_s: Callable[[], float]
    all_parts: bool = False


def _predict(side: Side, method: str, step: Callable) -> Prediction:
    graphs, begin = side.graphs(), time.perf_counter()
    out, peak = side.run(step)
    values = array(out)
    return Prediction(method, values, time.perf_counter() - begin, peak, None if graphs is None else side.graphs() - graphs)


def _failed(result: dict[str, Any], what: str, error: Exception, say: Callable[[str], None]) -> None:
    """The result and the screen say what failed."""
    result["failed"][what] = f"{type(error).__name__}: {error}"[:600]
    say(f"failed {what}: {error!r}"[:1500])


def _mode(side: Side, model: Any, mode: str, steps: Mapping[str, Callable], first: Prediction, eager: dict[str, np.ndarray],
          budget: Budget, result: dict[str, Any], say: Callable[[str], None], save: Callable[[dict], None]) -> None:
    """Checks, then times the steps of one mode that the result does not have; saved whenever there is more to tell."""
    before = result["rows"]
    has = [row for row in before if row["mode"] == mode]
    rows: list[dict[str, Any]] = []

    def keep(told: Callable[[str], None] = lambda text: None) -> None:
        timed = [row for row in rows if "median_ms" in row]
        _compare([*has, *timed], told)
        result["rows"], result["not_timed"] = [*before, *timed], [row for row in rows if row not in timed]
        save(result)

    def shortest() -> float:
        return min((row["first_call_s"] for row in rows), default=0.0)

    side.begin_mode(model, mode)
    for method in [method for method in steps if method not in [row["method"] for row in has]]:
        try:
            known = first if mode == "eager" and method == first.method else None
            made = known or _predict(side, method, _in_time(steps[method], budget.left_s, shortest))
            rows.append(_checked(side, mode, made, steps[method], first.values, eager))
            say(f"checked {title(method)}, {mode}: {rows[-1]['sqnr_db']:.1f} dB, {rows[-1]['first_call_s']} s")
            result["ran"] |= lowbit_video.coverage(model).variants()
        except Exception as error:  # noqa: BLE001 - the result says what failed
            _failed(result, f"{method}, {mode}", error, say)
        finally:
            side.release()  # the next one, too, finds all memory in one piece
        keep()
    try:
        _time(side, rows, steps, budget, keep,
              lambda method, error: _failed(result, f"{method}, timing, {mode}", error, say))
    except Exception as error:  # noqa: BLE001
        _failed(result, f"timing, {mode}", error, say)
    keep(say)
    if not side.no_kernels:
        _kernel_parts(side, model, mode, steps, has, budget, result, say, save)


def _kernel_parts(side: Side, model: Any, mode: str, steps: Mapping[str, Callable], cold: Sequence[dict[str, Any]],
                  budget: Budget, result: dict[str, Any], say: Callable[[str], None], save: Callable[[dict], None]) -> None:
    """Fills in where the device's time goes, of each row of one mode that does not have it, by one more step of it.

    cold: rows of an earlier call, whose steps did not run in this one.
    """
    modules = list(attention_modules(model).values()) if mode == "eager" else []
    for row in [row for row in result["rows"] if row["mode"] == mode and row["method"] in steps and "parts_ms" not in row]:
        method = row["method"]
        if row["median_ms"] > PARTS_MS and not budget.all_parts:
            result["left_out"]["parts by kernel"] = f"of steps of more than {PARTS_MS / 1e3:.0f} s with --parts only"
            continue
        try:
            step = _in_time(steps[method], budget.left_s, functools.partial(_seconds, row))
            if row in cold:
                step()
            row.update(kernel_parts.found(side.trace(step, modules), row["median_ms"], mode == "eager"))
            say(f"kernels of {title(method)}, {mode}: " + ", ".join(f"{part} {ms:.2f} ms"
                                                                    for part, ms in row["parts_ms"].items()))
        except Exception as error:  # noqa: BLE001 - the result says what failed
            _failed(result, f"{method}, parts by kernel, {mode}", error, say)
        save(result)


def _profiles(side: Side, model: Any, steps: dict[str, Callable], result: dict[str, Any], say: Callable[[str], None]
              ) -> list[dict[str, Any]]:
    """Where each method's time goes; what fails is told."""
    found = []
    for method, step in steps.items():
        try:
            found.append(parts.profile(side, model, method, step, fused=fuses(method)))
            say(f"parts of {title(method)}: {found[-1]['marked_ms']:.2f} ms, host {found[-1]['host_ms']:.2f} ms")
        except Exception as error:  # noqa: BLE001
            _failed(result, f"{method}, profile", error, say)
    return found


def _first(side: Side, steps: dict[str, Callable], result: dict[str, Any], say: Callable[[str], None]) -> Prediction | None:
    """The first method's that has one, eager, which the others are checked against; None where none has."""
    for method, step in list(steps.items()):
        try:
            return _predict(side, method, step)
        except Exception as error:  # noqa: BLE001 - the result says what failed
            del steps[method]
            _failed(result, method, error, say)
        finally:
            side.release()
    return None


def array(value: Any) -> np.ndarray:
    """A tensor's values on the host, float32."""
    return value if isinstance(value, np.ndarray) else runtime_of(value).to_numpy(value)


def sqnr_db(value: Any, wanted: Any) -> float:
    """Signal to noise in dB of tensors or arrays; infinite for equal ones."""
    return accuracy.sqnr_db(array(value), array(wanted))


def _checked(side: Side, mode: str, made: Prediction, step: Callable, wanted: np.ndarray, eager: dict[str, np.ndarray]
             ) -> dict[str, Any]:
    """A row with what was checked; raises AssertionError where a step is wrong."""
    method, out = made.method, made.values
    row: dict[str, Any] = dict(method=method, mode=mode, sqnr_db=sqnr_db(out, wanted), first_call_s=round(made.seconds, 2))
    if made.graphs is not None:
        row["graphs"] = made.graphs
    assert np.isfinite(out).all(), "the prediction is not finite"
    floor = -math.inf if method == NONE else FLOOR_DB["exact" if method in EXACT else "low bit"]
    assert row["sqnr_db"] >= floor, f"{row['sqnr_db']:.1f} dB beside the first method's prediction, wanted {floor}"
    peak = made.peak_gib
    if mode == "eager":
        eager[method] = out
    else:
        breaks = side.breaks()
        assert not breaks, f"broken by {breaks}"
        if method in eager:
            row["sqnr_to_eager_db"] = sqnr_db(out, eager[method])
            assert row["sqnr_to_eager_db"] >= floor, f"{row['sqnr_to_eager_db']:.1f} dB beside itself in eager mode"
        if peak is not None:
            _, peak = side.run(step)  # the first compiled one had what compilation takes, too
    if peak is not None:
        row["peak_gib"] = peak
    return row


def _seconds(row: Mapping[str, Any]) -> float:
    """What a step takes, as far as is known."""
    return row["median_ms"] / 1e3 if "median_ms" in row else row["first_call_s"]


def _in_time(step: Callable[[], Any], left_s: Callable[[], float], takes_s: Callable[[], float]) -> Callable[[], Any]:
    """The step, which raises TimeoutError in place of beginning what would not end in time."""

    def run() -> Any:
        if left_s() < takes_s():
            raise TimeoutError(f"{left_s():.0f} s were left, and a step takes {takes_s():.1f}")
        return step()

    return run


class HostClock:
    """A `timing.Timer` of a device without a clock of its own, whose steps end before they return."""

    def sample(self, call: Callable[[], object], runs: int, host_us: float) -> list[float]:
        """Times in ms of `runs` calls."""
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
        return times


def _time(side: Side, rows: list[dict], steps: Mapping[str, Callable], budget: Budget, told: Callable[[], None],
          failed: Callable[[str, Exception], None]) -> None:
    """Fills in medians and percentiles of what held, taken in turns; told is called when there are more."""
    calls = {row["method"]: _in_time(steps[row["method"]], budget.left_s, functools.partial(_seconds, row)) for row in rows}
    if not calls:
        return

    def fill(times: Mapping[str, timing.Timing]) -> None:
        for row in rows:
            if taken := times.get(row["method"]):
                row.update(median_ms=taken.median_ms, low_ms=taken.low_ms, high_ms=taken.high_ms, runs=taken.runs)
        told()

    if side.device == "cpu":
        timer, budget_ms, slow_ms = HostClock(), 0.0, 0.0
    else:
        like = side.like()
        timer, budget_ms, slow_ms = timing.Timer(runtime_of(like), like), budget.device_ms, SLOW_MS
    fill(timing.time_together(timer, calls, budget_ms=budget_ms, least_rounds=budget.rounds, slow_ms=slow_ms, told=fill,
                              failed=failed))


def _compare(rows: list[dict], say: Callable[[str], None]) -> None:
    """Fills in speed-ups over the mode's fastest exact method, and attention's share: what a step takes beyond no attention."""
    best = min((row["median_ms"] for row in rows if row["method"] in EXACT), default=None)
    without = next((row["median_ms"] for row in rows if row["method"] == NONE), None)
    for row in rows:
        row["speedup_over_exact"] = best / row["median_ms"] if best else None
        row["attention_share"] = 1 - without / row["median_ms"] if without else None
        say(f"{title(row['method']):<17} {row['mode']:<8}{row['median_ms']:10.2f} ms"
            + (f"  {row['speedup_over_exact']:.3f}x of the best exact" if best else ""))
