"""Compiles the Hopper kernel ahead of time for sm_90a, without a GPU, and prints what ptxas says of each build as JSON.

    python tests/kernels/hopper_aot.py HEAD_DIM PV DTYPE CAUSAL FIELDS [HEAD_DIM PV DTYPE CAUSAL FIELDS ...]

FIELDS: JSON object of what differs from the default HopperConfig.

A process of its own, because Triton has one active driver to a process and this one replaces it.
"""
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from lowbit_video.kernels.attention.hopper import launch as hopper
from lowbit_video.kernels.buffers import Buffer


class NoDriver:
    """An sm_90 GPU that can only be compiled for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compile_kernel(head_dim, pv, dtype, causal, qk="int8", config=None):
    """The compiled kernel; config: how it is built, None for the default."""
    buffer = lambda name: Buffer(1 << 20, name)
    f32, shape = buffer("float32"), (2, 6, 1000, head_dim)
    strides = (1000 * 6 * head_dim, head_dim, 6 * head_dim)
    _, arguments, constants = hopper.launch_arguments(
        buffer("int8"), buffer("int8"), buffer("int8" if pv == "fp8" else dtype), buffer(dtype), q_shape=shape, kv_shape=shape,
        q_format=qk, pv_format=pv, out_strides=strides, v_strides=strides, q_scale=f32, k_scale=f32, v_scale=f32, sm_scale=0.1,
        lse=f32, lse_shift=f32, is_causal=causal, config=config)
    return hopper.attn_fwd_kernel.warmup(*arguments, **constants, grid=(1,))


def ptxas(kernel):
    """Registers, spilled bytes, shared bytes and warnings about serialised wgmma; SASS opcodes of the tensor cores."""
    bin_folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(kernel.asm["ptx"])
        run = lambda tool, *words: subprocess.run([bin_folder / tool, *words], capture_output=True, text=True, check=True)
        log = run("ptxas", "-v", "--gpu-name=sm_90a", source, "-o", cubin).stderr
        sass = run("nvdisasm", "-c", cubin).stdout
    return dict(registers=int(re.search(r"Used (\d+) registers", log)[1]),
                spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]), shared=kernel.metadata.shared,
                warnings=sorted(set(re.findall(r"C75\d\d", log))),
                tensor_ops=sorted(set(re.findall(r"\b[HIQ]GMMA\.\S+", sass))))


if __name__ == "__main__":
    triton.runtime.driver.set_active(NoDriver())
    words = sys.argv[1:]
    for i in range(0, len(words), 5):
        dim, pv_format, half, is_causal, fields = words[i:i + 5]
        changed = replace(hopper.CONFIGS[int(dim), pv_format == "fp8"], **json.loads(fields))
        print(json.dumps(ptxas(compile_kernel(int(dim), pv_format, half, is_causal == "1", config=changed))), flush=True)
