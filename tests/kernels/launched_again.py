"""Launches what Triton compiles on a driver that writes down what it is given: by Triton's own launcher, and again by ours.

    python launched_again.py some
    python launched_again.py all

LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH hold the driver (fake_cuda.c, as libcuda.so.1), FAKE_CUDA_ARCH names the target.
Some take seconds to compile, all half a minute. Prints what each launched, and how it was repeated.
"""
from __future__ import annotations

import ctypes
import itertools
import json
import sys

import triton

from lowbit_video.kernels.buffers import Buffer, Origin
from lowbit_video.kernels.launch import Launch, recorded
from lowbit_video.runtime import cuda_driver, triton_driver

import offline

STREAM, DEVICE = 0x5555, 1
APART, SHIFT = 1 << 34, 1 << 21
"""Bytes between tensors, and that all lie further on when a launch is repeated: the bit that Triton clears in small maps."""
TIDY, ODD = 64, 4
"""Bytes from a tensor's beginning to what is read of it."""

taken = ctypes.CDLL("libcuda.so.1")
taken.fake_take.restype = ctypes.c_char_p


def cases(arch: tuple[int, int], every: bool) -> list[tuple[object, int]]:
    """Launches of each kernel that Triton compiles, with every kind of argument among them, and where their memory begins."""
    Attention, small = offline.Attention, offline.Attention(arch, "int8", "int8", "fp16", 64, "bfloat16", tokens=100)
    some = [(small, TIDY), (Attention(arch, "int8", "int8", "fp16", 128, full=True, tokens=2_000_000), TIDY),  # wide strides
            (offline.Exchange(arch), ODD)]
    if not every:
        return some
    found = [Attention(arch, "fp16", "fp16", "fp16", 128, full=True), offline.Exchange(arch), offline.Quantisers(arch, 64),
             Attention(arch, "int4", "int4", "fp16", 128, "bfloat16", "token", True)]
    if arch >= (8, 9):
        found += [Attention(arch, "int8", "int8", "fp8", 64, full=True), Attention(arch, "fp8", "fp8", "fp8", 128, "float32")]
    if arch == (9, 0):
        found += [offline.Hopper(64, "fp8"), offline.Hopper(128, "fp16", True, "shifted")]
    return [*some, *[(case, TIDY) for case in found], (small, ODD)]


def launched(case: object, begin: int, shift: int) -> tuple[list[str], list[Launch]]:
    """What the driver was given for a case whose tensors lie `shift` bytes further on, and the recorded launches."""
    numbers = itertools.count(1)

    def buffer(dtype: str) -> Buffer:
        number = next(numbers)
        return Buffer(number * APART + shift + begin, dtype, Origin(str(number), begin))

    offline.buffer = buffer
    with recorded() as launches:
        offline.LAUNCH[type(case)](case)
    return lines(), launches


def lines() -> list[str]:
    return [line for line in taken.fake_take().decode().splitlines() if " on device " in line]


def main() -> None:
    driver = triton_driver.device_driver(DEVICE, lambda: STREAM)
    assert driver.utils
    told, wanted = [], cases(cuda_driver.capability(DEVICE), sys.argv[1:] == ["all"])
    for case, begin in wanted:
        with triton_driver.active(driver):
            theirs, launches = launched(case, begin, 0)
            numbers = {str(number): number for number in range(64)}
            replays = [one.replay(cuda_driver, numbers) for one in launches]
            taken.fake_take()
            again = []
            for shift in (0, SHIFT, SHIFT):
                for replay in replays:
                    replay(STREAM, [number * APART + shift for number in numbers.values()])
                again.append(lines())
            there, _ = launched(case, begin, SHIFT)
        told.append(dict(case=str(case), begin=begin, theirs=theirs, there=there, again=again,
                         alive=[replay.owner is one.compiled for replay, one in zip(replays, launches)]))
    print(json.dumps(dict(triton=triton.__version__, cases=told)))


if __name__ == "__main__":
    main()
