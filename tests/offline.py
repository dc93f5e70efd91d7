"""Compile what a launcher would launch, for any arch, with no GPU: Triton gets a driver that only names a target."""
from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from lowbit_video.kernels.buffers import Buffer
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class OfflineDriver:
    """Just enough of a Triton driver to compile for `arch`."""

    def __init__(self, arch: tuple[int, int]):
        self.target = GPUTarget("cuda", 10 * arch[0] + arch[1], 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton caches kernels by device: one for each arch

    def get_current_stream(self, device=None):
        return 0

    def map_python_to_cpp_type(self, name):
        return name


@contextlib.contextmanager
def compiling(arch):
    """Inside, launches compile for `arch` and launch nothing; yields the list that the compiled kernels go to."""
    kernels, run = [], jit.JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    before = driver._active
    jit.JITFunction.run = compile_only
    driver.set_active(OfflineDriver(arch))
    try:
        yield kernels
    finally:
        jit.JITFunction.run = run
        driver._active = before


def buffer(dtype: str) -> Buffer:
    """Memory that nothing will touch, well aligned."""
    return Buffer(1 << 30, dtype)


def resources(kernel) -> dict[str, int]:
    """Registers per thread, stack (where spills go) and shared memory in bytes, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        report = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", report)}
    return dict(registers=found["REG"], stack=found["STACK"], shared=kernel.metadata.shared)
