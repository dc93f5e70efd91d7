"""Every way to share one video by some GPUs, best first, and a prediction beside each thing that was measured."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..mesh import Degrees
from ..shares import even_shares, joint_shares
from .attention import Layer, call_ms, layer, pieces_of
from .figures import Figures, Link, Program, Tile
from .models import find_model
from .rest import best_vae, decode_ms, linear_ms, memory_gib
from .task import Share, Task, share_of
from .wire import Transfers, ring_bytes, statistics_bytes, ulysses_bytes

MAX_GPUS = 64
"""The most GPUs that are planned for."""
NOISE_BYTES = 2
"""Of a value of the transformer's output."""


@dataclass(frozen=True)
class Cost:
    """What a split costs.

    step: ms of one step by part, on the busiest rank. sent: bytes that the busiest rank sends a step, by purpose. By a recipe
    both are means of all steps. memory: GiB of a GPU by part. decode_ms: of the VAE. video_s: all of a video, seconds. fits:
    whether the GPU has the memory.
    """

    degrees: Degrees
    step: Mapping[str, float]
    sent: Mapping[str, int]
    memory: Mapping[str, float]
    decode_ms: float
    video_s: float
    fits: bool

    @property
    def step_ms(self) -> float:
        return sum(self.step.values())

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())

    @property
    def memory_gib(self) -> float:
        return sum(self.memory.values())


def sent_bytes(task: Task, degrees: Degrees, share: Share) -> dict[str, int]:
    """Bytes that the busiest rank sends in one step, by purpose; only what is sent at all."""
    u, r, size = degrees.ulysses, degrees.ring, degrees.ulysses * degrees.ring
    values = task.video_tokens * task.model.token_values * NOISE_BYTES
    rows = max(joint_shares(task.model.text_tokens, task.video_tokens, size)[1]) if size > 1 else 0
    sent = dict.fromkeys(("attention in", "attention out", "statistics", "ring"), 0.0)
    for precision, layers in task.layers.items():
        part = task.parts[precision]
        there, back = ulysses_bytes(part, degrees, share.batch, pieces_of(part, degrees, share)) if u > 1 else (0, 0)
        for purpose, count in (("attention in", there), ("attention out", back),
                               ("statistics", statistics_bytes(part, degrees, share.batch)),
                               ("ring", (r - 1) * ring_bytes(part, share, share.heads))):
            sent[purpose] += layers * count
    sent |= {"output tokens": (size - 1) * share.batch * rows * task.model.token_values * NOISE_BYTES,
             "guidance": values if degrees.cfg == 2 else 0}
    return {purpose: round(count) for purpose, count in sent.items() if count}


def cost_of(task: Task, degrees: Degrees) -> Cost:
    """What a split costs. Raises ValueError where it cannot be, with the reason."""
    share = share_of(task, degrees)
    sent = sent_bytes(task, degrees, share)
    each = {precision: (linear_ms(part, share), layer(part, degrees)) for precision, part in task.parts.items()}
    step: dict[str, float] = {}
    for kind in task.alike:
        for name, ms in _step(task, degrees, kind.layers, each, sent).items():
            step[name] = step.get(name, 0.0) + kind.share * ms
    memory = max((memory_gib(part, degrees, share) for part in task.parts.values()), key=lambda one: sum(one.values()))
    decode = decode_ms(task, degrees)
    seconds = (task.steps * sum(step.values()) + task.figures.video.text_ms + decode) / 1e3
    return Cost(degrees, step, sent, memory, decode, seconds, sum(memory.values()) <= task.figures.gpu.memory_gib)


def _step(task: Task, degrees: Degrees, layers: Mapping[str, int], each: Mapping[str, tuple[float, Layer]],
          sent: Mapping[str, int]) -> dict[str, float]:
    """ms of one step by part. layers: how many have each precision. each: what a layer of a precision costs, ms without
    attention, and attention."""
    transfers, total = Transfers(task, degrees), lambda of: sum(count * of(*each[name]) for name, count in layers.items())
    step = {"linear": total(lambda linear, attention: linear) + task.program.step_ms,
            "attention": total(lambda linear, attention: attention.attention_ms),
            "exchange": total(lambda linear, attention: attention.exchange_ms)}
    if "output tokens" in sent:
        step["exchange"] += transfers.exchange_ms(sent["output tokens"], "sequence")
    step["guidance"] = transfers.exchange_ms(sent["guidance"], "cfg") if "guidance" in sent else 0.0
    step["host"] = max(0.0, task.model.layers * task.program.layer_host_us / 1e3 - sum(step.values()))
    step["scheduler"] = task.figures.video.scheduler_ms
    return step


def splits(task: Task, gpus: int) -> tuple[list[Cost], list[tuple[Degrees, str]]]:
    """(every split by so many GPUs that can be, those that fit into memory first and then the fastest first; the others, with
    the reason). Raises ValueError for a number of GPUs that is not planned for.
    """
    if not 1 <= gpus <= MAX_GPUS:
        raise ValueError(f"{gpus} GPUs; from 1 to {MAX_GPUS} are planned for")
    found, refused = [], []
    for cfg in (1, 2):
        for ulysses in (u for u in range(1, gpus + 1) if gpus % (cfg * u) == 0):
            degrees = Degrees(cfg, ulysses, gpus // cfg // ulysses)
            try:
                share_of(task, degrees)
            except ValueError as reason:
                refused.append((degrees, str(reason)))
                continue
            found.append(cost_of(task, Degrees(cfg, ulysses, degrees.ring, best_vae(task, degrees))))
    # of those that the host sets the pace of, the one that leaves the GPU the least to do; equal sums differ in a last digit
    order = lambda cost: (not cost.fits, round(cost.video_s, 6), cost.step_ms - cost.step["host"])
    return sorted(found, key=order), refused


APART = (" computed", " exchanged")
"""After "layer" and "transformer": that on a wire that takes no time, and what travels of it with nothing computed."""
WHATS = ("attention", "ring part", "exchange in", "exchange out", "ring transfer", "layer", "transformer", "step", "decode",
         *(what + part for what in ("layer", "transformer") for part in APART))
"""What a measured row may be of: a rank's attention without exchange; a part of a ring; an all-to-all of Q, K and V and of the
output, in one piece; K and V to the neighbour; attention of a layer with its exchange; all layers and the output; that with
guidance and scheduler; the VAE's decoding; and APART."""


def task_of(row: Mapping[str, Any], figures: Figures) -> tuple[Task, Degrees]:
    """What a measured row was a measurement of. Raises ValueError where it says what cannot be."""
    names = ("precision", "exchange", "output", "keys", "link", "framework", "cuda_graph", "frames", "height", "width")
    try:
        given = {"keys": "round"} | {name: row[name] for name in names if row.get(name) is not None}
        task = Task(find_model(row["model"]), figures, **given)
        degrees = Degrees(**{name: row[name] for name in ("cfg", "ulysses", "ring", "vae") if row.get(name)})
        if row["what"] in WHATS and row["ms"] > 0:
            return task, degrees
    except (KeyError, TypeError) as reason:
        raise ValueError(f"a measured row needs what, model and ms ({type(reason).__name__}: {reason}): {dict(row)}") from None
    raise ValueError(f"a measured row is of {row['what']!r} with {row['ms']} ms; known are, with more than 0 ms: "
                     f"{', '.join(WHATS)}")


def free_wire(figures: Figures) -> Figures:
    """With links on which nothing takes time."""
    return replace(figures, links=dict.fromkeys(figures.links, Link(0, math.inf, 0, math.inf, 0)))


def free_gpu(figures: Figures) -> Figures:
    """With a GPU on which nothing takes time."""
    return replace(
        figures, attention={dim: Tile(tile.rows, 0, 0, 0) for dim, tile in figures.attention.items()},
        around=replace(figures.around, quantise_ps=0, merge_ps=0, copy_gb_s=math.inf),
        programs={name: Program(math.inf, 0, 0, 0, 0, {}) for name in figures.programs})


def predict(row: Mapping[str, Any], figures: Figures) -> float:
    """The ms that the model of cost says of a measured row.

    row: what (of WHATS), model, ms; as they differ from the defaults precision, exchange, output, keys, link, framework,
    frames, height, width, cfg, ulysses, ring, vae; cuda_graph, whether the step was one. Others are left alone. keys:
    "gathered", or "round", as in rows without it.
    """
    what, (task, degrees) = row["what"], task_of(row, figures)
    if what.endswith(APART):
        figures = free_wire(figures) if what.endswith(APART[0]) else free_gpu(figures)
        what, (task, degrees) = what.partition(" ")[0], task_of(row, figures)
    share, transfers = share_of(task, degrees), Transfers(task, degrees)
    if what in ("attention", "ring part"):
        return call_ms(task, share.batch * share.heads, share.part_rows, share.part_rows)
    if what in ("exchange in", "exchange out"):
        whole = [even_shares(task.model.heads, degrees.ulysses)]
        return transfers.exchange_ms(ulysses_bytes(task, degrees, share.batch, whole)[what == "exchange out"], "ulysses")
    if what == "ring transfer":
        return transfers.neighbour_ms(ring_bytes(task, share, share.heads))
    if what == "layer":
        return layer(task, degrees).total_ms
    cost = cost_of(task, degrees)
    if what == "decode":
        return cost.decode_ms
    return cost.step_ms - (0.0 if what == "step" else cost.step["guidance"] + cost.step["scheduler"])
