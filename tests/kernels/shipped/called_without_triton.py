"""Whole attention calls where Triton is not, on tensors that are only addresses, over a driver that writes down launches.

    python called_without_triton.py

LD_LIBRARY_PATH holds the driver. Prints what each call launched, the first time and from its plan.
"""
from __future__ import annotations

import ctypes
import json
import re
import sys
import types
import warnings
from math import prod

sys.modules["triton"] = None  # as where it is not installed: an import of it fails

from lowbit_video.engine.options import AttentionOptions  # noqa: E402
from lowbit_video.engine.run import run  # noqa: E402
from lowbit_video.errors import UnsupportedError  # noqa: E402
from lowbit_video.kernels.shipped.choice import triton_version  # noqa: E402
from lowbit_video.kernels.shipped.launch import Place  # noqa: E402
from lowbit_video.precision import Precision  # noqa: E402
from lowbit_video.runtime import cuda_driver, detect, placing  # noqa: E402

CALLS = {"int8+fp8": {}, "int8+fp16": dict(return_lse=True), "fp8+fp8": dict(is_causal=True, return_lse=True),
         "exact": dict(return_lse=True, backend="hopper")}
driver = ctypes.CDLL("libcuda.so.1")
driver.fake_take.restype = ctypes.c_char_p


class Tensor:
    """A contiguous tensor on a device, somewhere in memory that nobody touches."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str, device: int) -> None:
        self.address, self.shape, self.dtype, self.device = address, tuple(shape), dtype, device

    def data_ptr(self) -> int:
        return self.address


class Memory:
    """Gives addresses, the same ones after `begin`."""

    def begin(self) -> None:
        self.next = 1 << 40

    def empty(self, shape, dtype, like):
        made = Tensor(self.next, shape, dtype, like.device)
        self.next += 1 << 32
        return made


class Counting(Place):
    """A place that counts the launches offered to it."""

    offered = 0

    def launch(self, *what):
        self.offered += 1
        return super().launch(*what)


memory = Memory()
places = [Counting(cuda_driver, ordinal, lambda: 0x77) for ordinal in range(2)]
runtime = types.SimpleNamespace(
    NAME="played", dtype_name=lambda t: t.dtype, shape=lambda t: t.shape, is_cpu=lambda t: False, arch=lambda t: (9, 0),
    strides=lambda t: tuple(prod(t.shape[axis + 1:]) for axis in range(len(t.shape))), place=lambda t: f"cuda:{t.device}",
    signature=lambda t: (t.shape, t.dtype, t.device), stream=lambda t: 0x77, contiguous=lambda t: t, empty=memory.empty,
    launch_guard=lambda t: placing.on(places[t.device]), wants_gradients=lambda *tensors: False, unreadable=lambda t: None)
detect.same_runtime = lambda **tensors: runtime


def launched() -> list[dict]:
    """What was launched since the last time."""
    lines = driver.fake_take().decode().splitlines()
    found = [re.match(r"(\w+) of (\w+) on device (\d) (.*)", line) for line in lines if " on device " in line]
    return [dict(name=one[1], code=one[2], device=int(one[3]), rest=one[4]) for one in found]


def main() -> None:
    warnings.simplefilter("ignore")
    told, offered, refused = {}, {}, ""
    for device in range(2):
        q, k, v = (Tensor((number + 1) << 34, (2, 5000, 6, 64), "float16", device) for number in range(3))
        for precision, more in CALLS.items():
            both, counts = [], []
            for _ in range(2):
                memory.begin()
                before = places[device].offered
                run(q, k, v, AttentionOptions(Precision(precision), **more))
                both.append(launched())
                counts.append(places[device].offered - before)
            told[f"{precision} on {device}"], offered[f"{precision} on {device}"] = both, counts
        if device == 0:
            try:
                run(q, k, v, AttentionOptions(Precision("int4+fp16")))
            except UnsupportedError as error:
                refused = str(error)
    current = ctypes.c_void_p()
    driver.cuCtxGetCurrent(ctypes.byref(current))
    print(json.dumps(dict(triton=triton_version(), calls=told, offered=offered, refused=refused,
                          contexts="as before" if not current.value else "changed",
                          loaded={place.ordinal: len(place._functions) for place in places})))


if __name__ == "__main__":
    main()
