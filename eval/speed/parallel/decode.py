"""The VAE's decode of a CogVideoX clip on several GPUs, beside one: 49 frames of 480x720."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lowbit_video.distributed.mesh import Degrees, Mesh

from .clock import Clock
from .memory import counted
from .models import paddle_vae

ROUNDS = 2
LATENTS = (1, 16, 13, 60, 90)


def measure(wire: Any, clock: Clock, say: Callable[[str], None], tiled: bool = False,
            rounds: int | None = None) -> dict[str, Any]:
    """Times and memory of a decode by one rank and by all; whether they are equal to the bit.

    tiled: by tiles as well. rounds: turns, at most ROUNDS.
    """
    runtime, vae = clock.runtime, paddle_vae()
    z = runtime.from_numpy(np.random.default_rng(0).standard_normal(LATENTS).astype(np.float32), clock.like, "float16")
    mesh = Mesh(wire, Degrees(ulysses=wire.size, vae=wire.size))
    ways = {"one": (False, False), "all": (True, False)}
    if tiled:
        ways.update({"one, tiles": (False, True), "all, tiles": (True, True)})

    @contextlib.contextmanager
    def shared(name: str) -> Iterator[None]:
        together, tiles = ways[name]
        vae.group, vae.degree = (mesh.world, wire.size) if together else (None, None)
        vae.enable_tiling() if tiles else vae.disable_tiling()
        with counted(runtime, peaks, name):
            yield
        vae.group = vae.degree = None

    outs, peaks, times = {}, {}, {name: [] for name in ways}
    for turn in range(1 + min(rounds or ROUNDS, ROUNDS)):
        for name in ways:
            with shared(name):
                if turn == 0:  # the first of each is slower, and does not count
                    outs[name] = runtime.to_numpy(vae.decode(z))
                else:
                    times[name].append(clock.once(lambda: vae.decode(z), passes=1))
    times, memory = clock.medians(times), clock.peaks(peaks)
    result: dict[str, Any] = {"latents": list(LATENTS), "ranks": wire.size, "traffic": mesh.traffic.as_dict(), "ways": {}}
    for name, milliseconds in times.items():
        base = "one, tiles" if ways[name][1] else "one"
        equal = bool(np.array_equal(outs[name], outs[base]))
        result["ways"][name] = {"ms": milliseconds, "speedup": times[base] / milliseconds, "equal": equal,
                                "memory_gib": memory[name]}
        say(f"decode, {name}: {milliseconds:.0f} ms, {times[base] / milliseconds:.2f}x, "
            + ("equal to the bit" if equal else "DIFFERS from one GPU"))
    return result
