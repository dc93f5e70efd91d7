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

from lowbit_video.kernels.attention.hopper.build import CONFIGS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import offline  # noqa: E402


def compile_kernel(head_dim, pv, dtype, causal, qk="int8", config=None):
    """The compiled kernel; config: how it is built, None for the default."""
    with offline.compiling((9, 0)) as kernels:
        offline.launch_hopper(offline.Hopper(head_dim, pv, causal, "shifted", dtype, qk), config)
    return kernels[0]


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
    words = sys.argv[1:]
    for i in range(0, len(words), 5):
        dim, pv_format, half, is_causal, fields = words[i:i + 5]
        changed = replace(CONFIGS[int(dim), pv_format == "fp8"], **json.loads(fields))
        print(json.dumps(ptxas(compile_kernel(int(dim), pv_format, half, is_causal == "1", config=changed))), flush=True)
