"""Attention of a layer on several GPUs, with its exchange, beside one GPU.

Every rank holds its share of the tokens, as a split transformer would. `one` is the whole attention on each GPU by itself, in
the same turns, so all ratios are of one run. Beside each split stand its computation without the transfers, and its transfers
alone (`apart`).
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit_video.distributed.group import Traffic
from lowbit_video.distributed.mesh import Degrees, Mesh
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.shares import begins, token_shares
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.hook.attend import exact_attend
from lowbit_video.hook.processors import LowBitAttnProcessor

from ..inputs import make_inputs
from ..shapes import Shape
from .apart import COMPUTED, EXCHANGED, Sizes, TappedWire, formats, replay
from .clock import ROUNDS, Clock

EXACT_HEADS = 2
"""Heads whose output is compared with exact attention."""


def measure(shape: Shape, precision: str, wire: Any, clock: Clock, say: Callable[[str], None], rounds: int | None = None
            ) -> dict[str, Any]:
    """Times, bytes and errors of one shape, of every split and what there is to travel. rounds: turns; None: ROUNDS."""
    size, runtime, like, wire = wire.size, clock.runtime, clock.like, TappedWire(wire)
    q, k, v = (runtime.contiguous(runtime.permute(x, (0, 2, 1, 3))) for x in make_inputs(runtime, shape.dims, "float16", like))
    shares = token_shares(shape.tokens, size)
    first = begins(shares)[wire.rank]
    own = [runtime.contiguous(x[:, first:first + shares[wire.rank]]) for x in (q, k, v)]
    low = LowBitAttnProcessor(precision).attend
    # PyTorch's own, the fastest there; our own kernel for Paddle, whose own holds all scores in memory on a custom device
    exact = exact_attend if runtime.NAME == "torch" else LowBitAttnProcessor("exact").attend
    traffic: dict[str, Traffic] = {}
    passed: dict[str, list[Sizes]] = {}

    def wrapped(name: str, degrees: Degrees, attend: Any, exchange: str, output: str = "16bit") -> Callable[[], Any]:
        mesh = Mesh(wire, degrees)
        traffic[name] = mesh.traffic
        inner = attend
        if degrees.ring > 1:
            parts = [sum(shares[part * degrees.ulysses:(part + 1) * degrees.ulysses]) for part in range(degrees.ring)]
            inner = ring(attend, mesh.ring, exchange, shares=parts)
        if degrees.ulysses > 1:
            inner = ulysses(inner, mesh.ulysses, exchange, output, shares=[shares[rank] for rank in mesh.ulysses.ranks])
        return lambda: inner(*own)

    calls: dict[str, Callable[[], Any]] = {"one": lambda: low(q, k, v), "one exact": lambda: exact(q, k, v)}
    degrees = [Degrees(ulysses=u, ring=size // u) for u in range(size, 0, -1) if size % u == 0 and u <= shape.heads]
    for one in degrees:
        name = " x ".join(f"{kind}{degree}" for kind, degree in (("ulysses", one.ulysses), ("ring", one.ring)) if degree > 1)
        for how, (exchange, output) in formats(precision).items():
            if one.ulysses > 1 or output == "16bit":
                calls[f"{name}, {how}"] = wrapped(f"{name}, {how}", one, low, exchange, output)
        calls[f"{name}, exact"] = wrapped(f"{name}, exact", one, exact, "16bit")

    few = [x[:, :, :EXACT_HEADS] for x in (q, k, v)]
    wanted = runtime.to_numpy(exact(*few))[:, first:first + shares[wire.rank]]
    errors, counted, failed = {}, {}, {}
    for name, call in list(calls.items()):
        wire.passed.clear()
        try:
            out = runtime.to_numpy(call()[:, :, :EXACT_HEADS])
        except Exception as error:  # on all ranks alike: a kernel that does not compile, say
            failed[name] = f"{type(error).__name__}: {error}"
            say(f"{shape} {name}: {failed[name]}")
            del calls[name]
            continue
        out = out[:, first:first + shares[wire.rank]] if name.startswith("one") else out
        error = np.array([np.abs(out - wanted).sum(), np.abs(wanted).sum()], np.float32)
        everyone = sum(clock.everyone(error))
        errors[name] = float(everyone[0] / everyone[1])
        if name in traffic:
            counted[name], passed[name] = traffic[name].as_dict(), list(wire.passed)

    def silent(call: Callable[[], Any]) -> None:
        with wire.silent():
            call()

    apart: dict[str, Callable[[], Any]] = {}
    for name in passed:
        apart[name + COMPUTED] = functools.partial(silent, calls[name])
        apart[name + EXCHANGED] = replay(wire.wire, passed[name], like)
    times = clock.together({**calls, **apart}, rounds or ROUNDS)
    result: dict[str, Any] = {"shape": list(shape.dims), "name": shape.name, "precision": precision, "ranks": size,
                              "shares": shares, "failed": failed, "methods": {}}
    for name in calls:
        milliseconds = times[name]
        base = times["one exact" if name.endswith("exact") else "one"]
        result["methods"][name] = {"ms": milliseconds, "of_ideal": base / size / milliseconds, "l1": errors[name],
                                   "bytes": counted.get(name)}
        if name in passed:
            result["methods"][name].update(computed_ms=times[name + COMPUTED], exchanged_ms=times[name + EXCHANGED])
        bytes_ = counted.get(name)
        ratio = (f", bytes {bytes_['sent_total'] / bytes_['in_16_bit_total']:.3f} of 16 bit, {times[name + COMPUTED]:.3f} ms "
                 f"computed and {times[name + EXCHANGED]:.3f} ms exchanged" if bytes_ else "")
        say(f"{shape} {name}: {milliseconds:.3f} ms, {100 * base / size / milliseconds:.1f} % of ideal, "
            f"L1 {errors[name]:.4f}{ratio}")
    return result
