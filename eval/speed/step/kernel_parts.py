"""Where a step's time on the device goes, by its kernels, as a profiler tells them of one step.

A kernel's part is told by its name. Where the name does not tell it (PyTorch's elementwise passes serve any part), it is told
by what launched it: an operator of attention, or the module of a model's attention, in which all that stands between the first
projection and attention prepares Q, K and V. Compiled blocks have no such modules: norms and positions of Q and K that the
compiler fuses are kernels as any others there, and `prologue_whole` says so.
"""
from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ATTENTION, PROLOGUE, PRODUCTS, OTHER, COPIES, IDLE = ("attention", "prologue", "matrix products", "norms and elementwise",
                                                      "copies", "idle")
PARTS = {
    ATTENTION: "its kernels",
    PROLOGUE: "what is done to Q, K and V between the projections and attention: norms, positions, statistics, codes",
    PRODUCTS: "projections, feed-forward and all other linear layers",
    OTHER: "norms, modulation, gates, activations and whatever else the model computes",
    COPIES: "tensors joined, copied and cast, and transfers from and to the host",
    IDLE: "what the step's median is beyond the sum of these",
}
RANGE = "lowbit_video bench: a module of attention"
"""What a profiler is told while such a module runs."""
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
"""Categories of events. Source: libkineto's ActivityType, whose names a trace of `torch.profiler` has."""
_OPERATORS = re.compile(r"lowbit_video_bench::|aten::_?scaled_dot_product")
_OURS = re.compile(r"(attn_fwd|pooled_part|merge)_kernel")
_NAMES = (
    (re.compile(r"triton_(poi|red|per|for)_"), OTHER),  # inductor's, whose names go on with the operators that they fuse
    (re.compile(r"triton_tem_(?!.*attention)"), PRODUCTS),
    (_OURS, ATTENTION),
    (re.compile(r"(prologue_\w+|quant_\w+|token_stats|fold_\w+|channel_ranges|score|list|(key|query)_tiles)_kernel"), PROLOGUE),
    (re.compile(r"(?i).*(quant|per_block_int8)"), PROLOGUE),  # SageAttention's
    (re.compile(r"(?i).*(flash|fmha|sdpa|attn|attention)"), ATTENTION),
    (re.compile(r"(?i).*(gemm|gemv|nvjet|cutlass|cublas|splitk|convol)"), PRODUCTS),
    (re.compile(r"(?i).*(CatArrayBatchedCopy|copy_kernel|nchwToNhwc|nhwcToNchw|convertTensor|memcpy|memset)"), COPIES),
)
"""The first that matches from a name's beginning: this project's, other libraries', cuBLAS's and cuDNN's, PyTorch's."""


@dataclass
class Kernel:
    """One on the device. ms: its time. order: when it was launched and when it began, in us of either's clock."""

    name: str
    ms: float
    order: tuple[float, float]
    part: str


def part_of(name: str) -> str:
    """The part that a kernel's name tells; OTHER for one that tells none."""
    return next((part for pattern, part in _NAMES if pattern.match(name)), OTHER)


def found(events: Iterable[Mapping[str, Any]], step_ms: float, eager: bool) -> dict[str, Any]:
    """What a row has of one profiled step.

    events: those of a trace in Chrome's format, times in us. step_ms: the step's median without a profiler. eager: modules of
    attention were told as RANGE.
    Returns parts_ms, by PARTS; prologue_share of the step; prologue_whole, whether no norm of Q and K is counted elsewhere.
    Raises ValueError where the trace has no kernel.
    """
    kernels = kernels_of(events)
    if not kernels:
        raise ValueError("the profiler told of no kernel")
    parts_ms = {part: sum(kernel.ms for kernel in kernels if kernel.part == part) for part in PARTS}
    busy_ms = sum(parts_ms.values())
    parts_ms[IDLE] = max(0.0, step_ms - busy_ms)
    count = lambda pattern: sum(bool(re.match(pattern, kernel.name)) for kernel in kernels)
    attended = count("attn_fwd_kernel") + sum(kernel.part == ATTENTION and not _OURS.match(kernel.name) for kernel in kernels)
    fused = 0 < attended <= count("prologue_(quant|apart)_kernel")
    return dict(parts_ms=parts_ms, prologue_share=parts_ms[PROLOGUE] / max(step_ms, busy_ms), prologue_whole=eager or fused)


def kernels_of(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """A trace's kernels with their parts, in the device's order."""
    events = [event for event in events if event.get("ph") == "X"]
    kernels = _kernels(events)
    _tell_by_launch(kernels, _spans(events, "cpu_op", _OPERATORS), _spans(events, "user_annotation", re.compile(RANGE)))
    return kernels


def _kernels(events: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """All, with the parts that their names tell. One whose launch is not told was launched where the one before it was."""
    launched = {event["args"]["correlation"]: event["ts"] for event in events
                if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})}
    kernels, at = [], float("-inf")
    for event in sorted((event for event in events if event.get("cat") in _DEVICE), key=lambda event: event["ts"]):
        at = launched.get(event.get("args", {}).get("correlation"), at)
        kernels.append(Kernel(event["name"], event["dur"] / 1e3, (at, event["ts"]), part_of(event["name"])))
    return kernels


def _spans(events: Sequence[Mapping[str, Any]], category: str, named: re.Pattern) -> list[tuple[float, float]]:
    """(begin, end) of events in order, those within another left out."""
    spans: list[tuple[float, float]] = []
    for event in sorted((event for event in events if event.get("cat") == category and named.match(event["name"])),
                        key=lambda event: event["ts"]):
        if not spans or event["ts"] >= spans[-1][1]:
            spans.append((event["ts"], event["ts"] + event["dur"]))
    return spans


def _around(spans: Sequence[tuple[float, float]], at: float) -> int | None:
    """Which span a time lies in."""
    place = bisect_right(spans, (at, float("inf"))) - 1
    return place if place >= 0 and at < spans[place][1] else None


def _tell_by_launch(kernels: Sequence[Kernel], operators: Sequence[tuple[float, float]], modules: Sequence[tuple[float, float]]
                    ) -> None:
    """Sets the parts that the launch tells better than the name."""
    inside: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        if (place := _around(modules, kernel.order[0])) is not None:
            inside.setdefault(place, []).append(kernel)
        if _around(operators, kernel.order[0]) is not None and kernel.part in (PRODUCTS, OTHER):
            statistics = kernel.part == OTHER and "at::native" in kernel.name and "softmax" not in kernel.name.lower()
            kernel.part = PROLOGUE if statistics else ATTENTION
    for place, own in inside.items():
        begin, end = modules[place]
        projected = min((kernel.order for kernel in own if kernel.part == PRODUCTS), default=(begin, 0.0))
        attended = max([kernel.order for kernel in own if kernel.part == ATTENTION]
                       + [(at, 0.0) for at, _ in operators if begin <= at < end], default=(begin, 0.0))
        for kernel in own:
            if (kernel.part in (OTHER, COPIES) and projected < kernel.order < attended
                    and _around(operators, kernel.order[0]) is None):
                kernel.part = PROLOGUE
