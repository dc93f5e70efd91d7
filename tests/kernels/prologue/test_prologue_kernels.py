"""The fused prologue's kernels: the oracle's codes in Triton's interpreter, and builds for sm_90 that spill nothing."""
from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from interpreted_run import pass_in_the_interpreter  # noqa: E402

from offline import Prologue  # noqa: E402

CASES = [Prologue((9, 0), 64, "float16", "layer", False), Prologue((9, 0), 64, "bfloat16", "layer", True),
         Prologue((9, 0), 128, "bfloat16", "rms", True, "fp8"), Prologue((9, 0), 128, "float16", "layer", True, "int4")]
PIECES = [Prologue((9, 0), 64, "bfloat16", "layer", True, pieces=True),
          Prologue((9, 0), 128, "float16", "layer", True, "int4", pieces=True)]


def test_prologue_in_the_interpreter():
    pass_in_the_interpreter(Path(__file__).with_name("interpreted_prologue.py"))


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
@pytest.mark.parametrize("case", CASES + PIECES, ids=str)
def test_it_compiles_without_spills(case, built):
    kernels = built(case)
    last = "prologue_values_kernel" if case.pieces else "prologue_apart_kernel"
    assert [kernel.name for kernel in kernels] == ["prologue_stats_kernel", "fold_stats_kernel", "prologue_quant_kernel", last]
    for kernel in kernels:
        print(f"{case}: {kernel.name}: {kernel.registers} registers, {kernel.shared} bytes shared")
        assert case.head_dim > 64 or kernel.registers <= 128, kernel  # two programs on a multiprocessor
        assert kernel.stack == 0 and kernel.shared <= 32 * 1024 and kernel.wide_loads, kernel
