"""Attention of a layer on several GPUs, with its exchange, beside one GPU.

Every rank holds its share of the tokens, as a split transformer would. `one` is the whole attention on each GPU by itself, in
the same turns, so all ratios are of one run.
"""
from __future__ import annotations

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
from .clock import Clock

EXACT_HEADS = 2
"""Heads whose output is compared with exact attention."""


def measure(shape: Shape, precision: str, wire: Any, clock: Clock, say: Callable[[str], None]) -> dict[str, Any]:
    """Times, bytes and errors of one shape."""
    size, runtime, like = wire.size, clock.runtime, clock.like
    q, k, v = (runtime.contiguous(runtime.permute(x, (0, 2, 1, 3))) for x in make_inputs(runtime, shape.dims, "float16", like))
    shares = token_shares(shape.tokens, size)
    first = begins(shares)[wire.rank]
    own = [runtime.contiguous(x[:, first:first + shares[wire.rank]]) for x in (q, k, v)]
    low = LowBitAttnProcessor(precision).attend
    # PyTorch's own, the fastest there; our own kernel for Paddle, whose own holds all scores in memory on a custom device
    exact = exact_attend if runtime.NAME == "torch" else LowBitAttnProcessor("exact").attend
    traffic: dict[str, Traffic] = {}
    meshes: dict[str, Mesh] = {}

    def wrapped(name: str, degrees: Degrees, attend: Any, exchange: str, output: str = "16bit") -> Callable[[], Any]:
        mesh = meshes[name] = Mesh(wire, degrees)
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
        calls[f"{name}, 16bit"] = wrapped(f"{name}, 16bit", one, low, "16bit")
        calls[f"{name}, codes"] = wrapped(f"{name}, codes", one, low, "auto")
        if one.ulysses > 1:
            calls[f"{name}, codes, int8 output"] = wrapped(f"{name}, codes, int8 output", one, low, "auto", "int8")
    calls[f"ulysses{size}, exact"] = wrapped(f"ulysses{size}, exact", Degrees(ulysses=size), exact, "16bit")

    few = [x[:, :, :EXACT_HEADS] for x in (q, k, v)]
    wanted = runtime.to_numpy(exact(*few))[:, first:first + shares[wire.rank]]
    errors, counted = {}, {}
    for name, call in calls.items():
        out = runtime.to_numpy(call()[:, :, :EXACT_HEADS])
        out = out[:, first:first + shares[wire.rank]] if name.startswith("one") else out
        error = np.array([np.abs(out - wanted).sum(), np.abs(wanted).sum()], np.float32)
        everyone = sum(clock.everyone(error))
        errors[name] = float(everyone[0] / everyone[1])
        if name in traffic:
            counted[name] = traffic[name].as_dict()
    times = clock.together(calls)
    result: dict[str, Any] = {"shape": list(shape.dims), "name": shape.name, "precision": precision, "ranks": size,
                              "shares": shares, "methods": {}}
    for name, milliseconds in times.items():
        base = times["one exact" if name.endswith("exact") else "one"]
        result["methods"][name] = {"ms": milliseconds, "of_ideal": base / size / milliseconds, "l1": errors[name],
                                   "bytes": counted.get(name)}
        bytes_ = counted.get(name)
        ratio = f", bytes {bytes_['sent_total'] / bytes_['in_16_bit_total']:.3f} of 16 bit" if bytes_ else ""
        say(f"{shape} {name}: {milliseconds:.3f} ms, {100 * base / size / milliseconds:.1f} % of ideal, "
            f"L1 {errors[name]:.4f}{ratio}")
    return result
