"""Compiled kernels stay what they are: the PTX of each build, its registers and its stack are those in ptx.json.

A change that means to leave kernels alone passes; one that means to change them says so by a new file:

    PYTHONPATH=tests python tests/kernels/test_ptx.py

PTX is compared without what only says where it comes from: `offline.code_of`.
"""
from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from offline import Attention, Hopper, Prologue, Quantisers, build, code_of  # noqa: E402

RECORD = Path(__file__).with_name("ptx.json")
HOPPER = [Hopper(head_dim, pv, causal, lse) for head_dim, pv, causal, lse in
          product((64, 128), ("fp8", "fp16"), (False, True), ("", "shifted"))]
HOPPER += [Hopper(64, "fp8", qk="fp8"), Hopper(128, "fp8", causal=True, lse="shifted", qk="fp8"), Hopper(128, "fp8", lse="lse"),
           Hopper(64, "fp8", dtype="bfloat16"), *(Hopper(head_dim, "fp16", dtype="bfloat16") for head_dim in (64, 128))]
HOPPER += [Hopper(head_dim, name, causal, lse, dtype, name) for head_dim in (64, 128)
           for name, dtype, causal, lse in (("fp16", "float16", False, ""), ("bf16", "bfloat16", True, "lse"))]
OLD, NEW = (8, 0), (9, 0)
PORTABLE = [case for arch in (OLD, NEW) for case in (
    Attention(arch, "int8", "int8", "fp16", 64), Attention(arch, "int8", "int8", "fp16", 128),
    Attention(arch, "int8", "int8", "fp16", 64, "bfloat16", full=True),
    Attention(arch, "int8", "int4", "fp16", 64, granularity="token"),
    Attention(arch, "int4", "int4", "fp16", 64, granularity="token", smooth_q=True),
    Attention(arch, "int2", "int2", "fp16", 128, granularity="token", smooth_q=True),
    Attention(arch, "fp16", "fp16", "fp16", 64), Attention(arch, "fp32", "fp32", "fp16", 64, "float32"), Quantisers(arch))]
PORTABLE += [Attention(NEW, "int8", "int8", "fp8", 64), Attention(NEW, "int8", "int8", "fp8", 128),
             Attention(NEW, "int4", "int4", "fp8", 128, granularity="token", smooth_q=True),
             Attention(NEW, "fp8", "fp8", "fp16", 128), Attention(NEW, "fp8", "fp8", "fp8", 64),
             Attention(NEW, "bf16", "bf16", "fp16", 64, "bfloat16")]
PROLOGUE = [Prologue(NEW, 64, "float16", "layer", False), Prologue(NEW, 128, "float16", "layer", True, "int4"),
            Prologue(NEW, 64, "bfloat16", "layer", True, pieces=True),
            Prologue(NEW, 128, "float16", "layer", True, "int4", pieces=True)]
CASES = HOPPER + PORTABLE + PROLOGUE


def summary(kernels):
    """What the record holds of each kernel of a case, in the order of its launches."""
    return [f"{kernel.name}: {kernel.registers} registers, stack {kernel.stack}, {kernel.ptx}" for kernel in kernels]


@pytest.fixture(scope="module")
def record():
    told = json.loads(RECORD.read_text())
    if told["triton"] != triton.__version__:
        pytest.skip(f"{RECORD.name} was made with Triton {told['triton']}, this is {triton.__version__}, whose code differs")
    return told["builds"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_code_is_the_recorded_one(case, record, built):
    assert summary(built(case)) == record[str(case)]


def test_nothing_else_is_recorded(record):
    assert list(record) == [str(case) for case in CASES]


def test_only_where_code_comes_from_is_left_out():
    ptx = "\n".join((
        "// Generated", ".target sm_90a", "\t.loc\t1 572 0  // hopper.py:572:0", "$L__func_begin0:", "$L__tmp3:", "$L__BB0_1:",
        "\tmov.b32 \t%r1, 0;  // why", "}", '\t.file\t1 "/a/hopper.py"', "\t.section\t.debug_loc", "{ }"))
    assert code_of(ptx).split("\n") == [".target sm_90a", "$L__BB0_1:", "mov.b32 \t%r1, 0;", "}"]


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        builds = {str(case): summary(kernels) for case, kernels in zip(CASES, pool.map(build, CASES))}
    RECORD.write_text(json.dumps(dict(triton=triton.__version__, builds=builds), indent=1) + "\n")
