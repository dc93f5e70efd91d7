"""The fused prologue's kernels: the oracle's codes in Triton's interpreter, and builds for sm_90 that spill nothing."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from offline import Prologue  # noqa: E402

CASES = [Prologue((9, 0), 64, "float16", "layer", False), Prologue((9, 0), 64, "bfloat16", "layer", True),
         Prologue((9, 0), 128, "bfloat16", "rms", True, "fp8"), Prologue((9, 0), 128, "float16", "layer", True, "int4")]


def test_prologue_in_the_interpreter():
    file = Path(__file__).with_name("interpreted_prologue.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], capture_output=True,
                          text=True, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_compiles_without_spills(case, built):
    kernels = built(case)
    assert [kernel.name for kernel in kernels] == ["prologue_stats_kernel", "fold_stats_kernel", "prologue_quant_kernel"]
    for kernel in kernels:
        print(f"{case}: {kernel.name}: {kernel.registers} registers, {kernel.shared} bytes shared")
        assert kernel.stack == 0 and kernel.shared <= 32 * 1024 and kernel.wide_loads, kernel
