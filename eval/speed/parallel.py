"""Attention of a layer on several GPUs, with its exchange, beside one GPU: one process a GPU, started by `bench parallel`.

Every rank holds its share of the tokens, as a split transformer would. A figure is the median over runs of the slowest rank's
time on its own stream; `one` is the whole attention on each GPU by itself, in the same turns, so all ratios are of one run.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_video.distributed.group import Group, Traffic
from lowbit_video.distributed.mesh import Degrees, Mesh
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.shares import begins, token_shares
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.files import write_json
from lowbit_video.hook.attend import exact_attend
from lowbit_video.hook.processors import LowBitAttnProcessor
from lowbit_video.runtime import cuda_driver, detect

from .inputs import make_inputs
from .shapes import Shape, parse_shapes
from .timing import L2_BYTES

ROUNDS = 12
"""Turns of every call."""


def wire_and_like(framework: str) -> tuple[Any, Any]:
    """(the wire, a tensor on this rank's GPU)."""
    if framework == "torch":
        import torch

        from lowbit_video.distributed.torch_wire import TorchWire

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
        return TorchWire(), torch.zeros(64, device="cuda")
    import paddle

    from lowbit_video.distributed.paddle_wire import paddle_wire

    wire = paddle_wire()
    return wire, paddle.zeros([64], dtype="float32")


class Clock:
    """Times calls on every rank at once."""

    def __init__(self, group: Group, runtime: Any, like: Any) -> None:
        self.group, self.runtime, self.like = group, runtime, like
        self.stream = runtime.stream(like)
        self.flush = runtime.empty((L2_BYTES,), "uint8", like)

    def once(self, call: Callable[[], object]) -> float:
        """ms of one call, from a cold L2 cache, begun on all ranks together."""
        begin, end = cuda_driver.Event(), cuda_driver.Event()
        cuda_driver.synchronize(self.stream)
        self.group.barrier()
        for _ in range(12):  # the host gets ahead of the device meanwhile
            cuda_driver.fill_bytes(self.flush.data_ptr(), 0, L2_BYTES, self.stream)
        begin.record(self.stream)
        call()
        end.record(self.stream)
        cuda_driver.synchronize(self.stream)
        return begin.elapsed_ms(end)

    def together(self, calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
        """Median ms of the slowest rank, of each call; in turns, every other round backwards."""
        for call in calls.values():
            call()
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in list(calls)[::-1 if turn % 2 else 1]:
                times[name].append(self.once(calls[name]))
        own = np.array([times[name] for name in calls], np.float32)
        everyone = [self.runtime.to_numpy(one) for one in self.group.all_gather(
            self.runtime.from_numpy(own, self.like, "float32"), self.runtime, "timing")]
        slowest = np.max(everyone, axis=0)
        return {name: statistics.median(map(float, slowest[number])) for number, name in enumerate(calls)}


def measure(shape: Shape, precision: str, wire: Any, like: Any, runtime: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Times, bytes and errors of one shape."""
    size = wire.size
    world = Group(wire, range(size), Traffic())
    q, k, v = (runtime.contiguous(runtime.permute(x, (0, 2, 1, 3))) for x in make_inputs(runtime, shape.dims, "float16", like))
    shares = token_shares(shape.tokens, size)
    first = begins(shares)[wire.rank]
    own = [runtime.contiguous(x[:, first:first + shares[wire.rank]]) for x in (q, k, v)]
    low = LowBitAttnProcessor(precision).attend
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

    calls: dict[str, Callable[[], Any]] = {"one": lambda: low(q, k, v), "one exact": lambda: exact_attend(q, k, v)}
    degrees = [Degrees(ulysses=u, ring=size // u) for u in range(size, 0, -1) if size % u == 0 and u <= shape.heads]
    for one in degrees:
        name = " x ".join(f"{kind}{degree}" for kind, degree in (("ulysses", one.ulysses), ("ring", one.ring)) if degree > 1)
        calls[f"{name}, 16bit"] = wrapped(f"{name}, 16bit", one, low, "16bit")
        calls[f"{name}, codes"] = wrapped(f"{name}, codes", one, low, "auto")
        if one.ulysses > 1:
            calls[f"{name}, codes, int8 output"] = wrapped(f"{name}, codes, int8 output", one, low, "auto", "int8")
    calls[f"ulysses{size}, exact"] = wrapped(f"ulysses{size}, exact", Degrees(ulysses=size), exact_attend, "16bit")

    exact = runtime.to_numpy(exact_attend(q[:, :, :2], k[:, :, :2], v[:, :, :2]))[:, first:first + shares[wire.rank]]
    errors, counted = {}, {}
    for name, call in calls.items():
        out = runtime.to_numpy(call()[:, :, :2])
        out = out[:, first:first + shares[wire.rank]] if name.startswith("one") else out
        error = np.array([np.abs(out - exact).sum(), np.abs(exact).sum()], np.float32)
        sums = world.all_gather(runtime.from_numpy(error, like, "float32"), runtime, "errors")
        everyone = sum(runtime.to_numpy(one) for one in sums)
        errors[name] = float(everyone[0] / everyone[1])
        if name in traffic:
            counted[name] = traffic[name].as_dict()
    clock = Clock(world, runtime, like)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=("paddle", "torch"), required=True)
    parser.add_argument("--shapes")
    parser.add_argument("--precision", default="int8+fp8")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    wire, like = wire_and_like(args.framework)
    runtime = detect.runtime_of(like)
    say = (lambda text: print(text, flush=True)) if wire.rank == 0 else (lambda text: None)
    device = cuda_driver.device_name(cuda_driver.device_of_pointer(like.data_ptr()) or 0)
    results = [measure(shape, args.precision, wire, like, runtime, say) for shape in parse_shapes(args.shapes)]
    if wire.rank == 0:
        write_json(args.out, {"gpu": device, "framework": args.framework, "ranks": wire.size, "attention": results})
    wire.barrier()
    sys.stdout.flush()
    os._exit(0)  # Paddle tears its communicators down after the CUDA runtime is gone


if __name__ == "__main__":
    sys.exit(main())
