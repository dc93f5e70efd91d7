"""Launches every shipped kernel twice on a driver that writes down what it is given: by Triton's own launcher, and by ours.

    python launched_twice.py

LD_LIBRARY_PATH and TRITON_LIBCUDA_PATH hold the driver (fake_cuda.c, as libcuda.so.1). Triton binds,
specialises and marshals the arguments as ever; only what it would compile is the shipped code. Prints what differed.
"""
from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
from types import SimpleNamespace

from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import CompiledKernel

from lowbit_video.kernels.buffers import Buffer, Origin
from lowbit_video.kernels.launch import recorded
from lowbit_video.kernels.shipped import build as building
from lowbit_video.kernels.shipped import store
from lowbit_video.kernels.shipped.cases import Sample, samples
from lowbit_video.kernels.shipped.launch import Place
from lowbit_video.runtime import cuda_driver, placing, triton_driver

STREAM, DEVICE = 0x5555, 1
SHIFT = 1 << 20
"""Bytes that everything lies further on when a launch is repeated."""


class Served(CompiledKernel):
    """What Triton would have compiled, of shipped code."""

    def __init__(self, source: object, build: store.Build) -> None:
        to_device = {host: number for number, host in TMA_DTYPE_DEVICE_TO_HOST.items()}
        maps = [dict(swizzle=one.swizzle, elem_size=one.element_bytes, elem_type=to_device[one.element_type],
                     block_size=one.block, fp4_padded=False) for one in build.maps]
        self.src, self.name, self.kernel, self.hash = source, build.function, store.image(build), ""
        self.metadata = SimpleNamespace(shared=build.shared, num_warps=build.warps, num_ctas=1, tensordesc_meta=maps,
                                        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
                                        profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False)
        self.packed_metadata = (build.warps, 1, build.shared)
        self.module = self.function = self._run = self.metadata_group = None


def by_triton(sample: Sample, build: store.Build, driver: object) -> None:
    """A launch through Triton; what it compiles for must be what the build says of itself."""
    def served(key, signature, device, constexprs, options, attrs, warmup):
        kernel = Served(sample.kernel.ASTSource(sample.kernel, signature, constexprs, attrs), build)
        building.check(sample.described, kernel)
        return kernel

    sample.kernel._do_compile = served
    with triton_driver.active(driver):
        sample.kernel[sample.grid](*sample.arguments, enable_fp_fusion=True, **sample.constants)


def moved(value: object, shift: int) -> object:
    """An argument that lies `shift` bytes further on, with its place as its origin."""
    if hasattr(value, "block_shape"):
        return type(value)(moved(value.base, shift), value.shape, value.strides, value.block_shape, value.layout, value.padding)
    if isinstance(value, Buffer):
        return Buffer(value.address + shift, value.dtype, Origin(str(value.address >> 30), value.address % (1 << 30)))
    return value


def by_us(sample: Sample, place: Place, replayed: bool) -> None:
    """A launch by ours; replayed: of a recorded one, on other memory."""
    before = [moved(value, 0) for value in sample.arguments]
    with placing.on(place):
        with recorded() as launches:
            assert place.launch(sample.kernel, sample.grid, before, sample.constants)
        if replayed:
            numbers = {str(number): number for number in range(64)}
            replay = launches[0].replay(cuda_driver, numbers)
            taken.fake_take()
            for shift in (0, SHIFT, SHIFT):
                replay(STREAM, [(number << 30) + shift for number in numbers.values()])


def far_apart() -> list[Sample]:
    """Launches whose V has batches further apart than 32 bits count."""
    found = [one for one in samples() if len(getattr(one.arguments[2], "block_shape", ())) == 4]
    return [one._replace(arguments=(*one.arguments[:2], dataclasses.replace(one.arguments[2], strides=[
        2**33, *one.arguments[2].strides[1:]]), *one.arguments[3:])) for one in (found[0], found[-1])]


taken = ctypes.CDLL("libcuda.so.1")
taken.fake_take.restype = ctypes.c_char_p


def main() -> None:
    driver = triton_driver.device_driver(DEVICE, lambda: STREAM)
    assert driver.utils
    told, wanted = [], int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for sample in (*samples()[::wanted], *far_apart()):
        build = store.find(sample.described)
        place = Place(cuda_driver, DEVICE, lambda: STREAM)
        by_us(sample, place, False)
        ours = taken.fake_take()
        by_triton(sample, build, driver)
        theirs = taken.fake_take()
        by_us(sample, place, True)
        again = taken.fake_take().splitlines()
        further = sample._replace(arguments=tuple(moved(value, SHIFT) for value in sample.arguments))
        by_triton(further, build, driver)
        there = taken.fake_take().splitlines()[-1:]
        told.append(dict(key=[*sample.described.key], ours=ours.decode(), theirs=theirs.decode(),
                         again=[line.decode() for line in again],
                         there=[theirs.splitlines()[-1].decode(), *[line.decode() for line in there * 2]]))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
