"""Builds of pooled attention for sm_90 without a GPU: lists cost attention no registers, the other kernels spill nothing."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from offline import Attention, Hopper, Pooling  # noqa: E402

RECORD = Path(__file__).parents[1] / "ptx.json"
MORE_STACK = {"hopper int8+fp8 D64 float16 shifted listed": 16, "sm_90 int8+fp8 D64 float16 listed": 8}
"""Bytes of stack that a build has beyond the one without lists; in the Hopper kernel's long loop there is none of it."""
STACK = {("pooled_part_kernel", "float32"): 8}
"""Bytes of stack of the other builds."""
LISTED = [Hopper(64, "fp8", lse="shifted", listed=True), Hopper(128, "fp8", listed=True),
          Attention((9, 0), "int8", "int8", "fp8", 64, listed=True)]


@pytest.mark.parametrize("case", LISTED, ids=str)
def test_lists_cost_no_registers(case, built):
    told = json.loads(RECORD.read_text())
    if told["triton"] != triton.__version__:
        pytest.skip(f"{RECORD.name} was made with Triton {told['triton']}, this is {triton.__version__}, whose code differs")
    (kernel,) = built(case)
    (without,) = told["builds"][str(case._replace(listed=False))]
    registers, stack = map(int, re.search(r"(\d+) registers, stack (\d+)", without).groups())
    print(f"{case}: {kernel.registers} registers, stack {kernel.stack}; without lists {registers}, {stack}")
    assert kernel.registers <= registers and kernel.stack <= stack + MORE_STACK.get(str(case), 0)


@pytest.mark.parametrize("case", [Pooling((9, 0), 128, "bfloat16", 45106), Pooling((8, 9), 128, "float32")], ids=str)
def test_the_other_kernels_compile(case, built):
    kernels = built(case)
    assert [kernel.name for kernel in kernels] == [f"{name}_kernel" for name in
                                                   ("key_tiles", "fold_tiles", "query_tiles", "score", "list", "pooled_part")]
    for kernel in kernels:
        assert kernel.stack <= STACK.get((kernel.name, case.dtype), 0) and kernel.shared <= 99 * 1024, kernel
    assert all(kernel.wide_loads for kernel in kernels if kernel.name in ("key_tiles_kernel", "query_tiles_kernel"))
    assert any("mma" in kind and "tf32" in kind for kind in kernels[3].mma) and kernels[5].mma
