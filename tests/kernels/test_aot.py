"""Every portable kernel compiles for every arch with no GPU, fits it, spills no more than known, and uses its tensor cores."""
from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from lowbit_video.kernels import tuning  # noqa: E402
from lowbit_video.kernels.variants import VARIANTS  # noqa: E402
from lowbit_video.precision import Precision  # noqa: E402

from offline import Attention, Exchange, Quantisers, sm  # noqa: E402

ARCHS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Shared memory that one program can have."""
HEAD_DIMS = {"int8+fp16": (64, 128, 256), "int8+fp8": (64, 128), "fp16": (64, 128, 256), "fp32": (64, 96, 256)}
"""Of the precisions with tiles of their own; the others take 64 and 128 in turn."""
STACK = {
    "sm_80 int8+fp16 D256 float16": 64,
    "sm_80 int8+fp16 D64 bfloat16 full": 72,
    "sm_80 fp16 D256 float16": 80,
    "sm_80 fp32 D64 float32": 8,
    "sm_86 int8+fp16 D64 bfloat16 full": 40,
    "sm_89 int8+fp16 D64 bfloat16 full": 40,
    "sm_89 int8+fp16 D72 float16": 432,
    "sm_89 int8+fp16 D256 float16": 72,
    "sm_89 fp16 D256 float16": 112,
    "sm_90 int8+fp16 D72 float16": 8,
    "sm_90 int8+fp8 D64 float16": 24,
    "sm_90 int8/int2+fp8 D64 float16": 8,
    "sm_90 int2+fp8 D64 float16": 16,
    "sm_90 fp8+fp8 D64 float16": 8,
    "sm_100 int8/int2+fp16 D128 float16": 56,
    "sm_100 int2+fp16 D128 float16": 56,
    "sm_100 int4+fp8 D128 float16": 40,
    "sm_100 fp32 D96 float32": 40,
    "sm_100 int8+fp16 D128 float32": 24,
    "sm_120 int8+fp16 D64 bfloat16 full": 32,
    "sm_120 int8+fp16 D256 float16": 80,
    "sm_120 int4+fp16 D64 float16": 16,
    "sm_120 int2+fp16 D128 float16": 32,
    "sm_120 int2+fp8 D64 float16": 8,
    "sm_120 fp16 D256 float16": 56,
}
"""Bytes of stack that a build is known to spill; 0 where nothing stands here."""


def attention_cases(arch):
    """Every precision of every portable variant; INT8 packed, causal, with LSE, in bfloat16 too, and of float32 tensors."""
    turn = 0
    for variant in VARIANTS:
        if variant.backend != "triton" or arch < variant.min_arch:
            continue
        for spec in variant.specs:
            precision = Precision(spec)
            q = k = spec
            if not precision.exact:
                q, k = precision.q, precision.k
            turn += 1
            dims = HEAD_DIMS.get(spec, ((64, 128)[turn % 2],))
            dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(spec, "float16")
            for head_dim in dims:
                if head_dim < 256 or arch not in ((8, 6), (10, 0)):  # which take these tiles from sm_80 and sm_90
                    yield Attention(arch, q, k, "fp16" if precision.exact else precision.pv, head_dim, dtype,
                                    precision.granularity or "block", precision.smooth_q)
    yield Attention(arch, "int8", "int8", "fp16", 64, "bfloat16", full=True)
    yield Attention(arch, "int8", "int8", "fp16", 128, "float32")


ATTENTION = [case for arch in ARCHS for case in attention_cases(arch)]
ATTENTION += [Attention(arch, "int8", "int8", "fp16", 72) for arch in ((8, 9), (9, 0))]  # rows of 72 bytes: no 16 at a time
QUANTISERS = [Quantisers(arch) for arch in ARCHS]
EXCHANGES = [Exchange((9, 0)), Exchange((8, 0), 72, "float16"), Exchange((12, 0), 128, "float32")]


def instructions(case):
    """The MMA of the scores and that of P.V: how each begins in PTX, and the operand types (or kind) that it names."""
    halves = "f16" if case.dtype == "float16" else "bf16"
    scores = {"fp8": "e4m3", "fp16": "f16", "bf16": "bf16", "fp32": "tf32"}.get(case.q, "s8")
    values = "tf32" if case.q == "fp32" else "e4m3" if case.pv == "fp8" else halves
    begins = {(9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma"}.get(case.arch, "mma.sync")
    for operands in (scores, values):
        if operands == "tf32" and case.head_dim > (128 if case.arch == (9, 0) else 64):
            yield "mma.sync", "tf32.tf32"  # the tile has fewer rows than the larger instructions take
        elif case.arch != (10, 0):
            yield begins, f"{operands}.{operands}"
        elif operands == "s8":
            yield "mma.sync", "s8.s8"  # Triton gives sm_100's integers to mma.sync
        else:
            yield begins, {"e4m3": "kind::f8f6f4", "tf32": "kind::tf32"}.get(operands, "kind::f16")


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_compiles(case, built):
    (kernel,) = built(case)
    assert kernel.stack <= STACK.get(str(case), 0), kernel
    assert kernel.shared <= SHARED_KIB[case.arch] * 1024, kernel
    for begins, operands in instructions(case):
        assert any(ptx.startswith(begins) and operands in ptx for ptx in kernel.mma), (begins, operands, kernel.mma)


@pytest.mark.parametrize("case", QUANTISERS, ids=str)
def test_quantisers_compile(case, built):
    kernels = built(case)
    assert len(kernels) >= 6
    for kernel in kernels:
        assert kernel.stack <= STACK.get(str(case), 0), kernel
        # rows come in as 16 bytes a thread
        assert "fold" in kernel.name or kernel.wide_loads, kernel


@pytest.mark.parametrize("case", EXCHANGES, ids=str)
def test_exchanges_compile(case, built):
    kernels = built(case)
    assert [kernel.name for kernel in kernels] == ["combine_stats_kernel", *["copy_parts_kernel"] * 2, "dequant_rows_kernel",
                                                   *["merge_kernel"] * 4]
    assert all(kernel.stack == 0 for kernel in kernels), kernels
    by_vectors, by_words = kernels[1:3]
    assert by_vectors.wide_loads and not by_words.wide_loads


def test_every_tile_of_the_table_is_compiled():
    compiled = set()
    for case in ATTENTION:
        padded = tuning.padded_head_dim(case.head_dim)
        compiled.add((case.arch, padded, tuning.lookup(tuning.family(case.q, case.k, case.pv), case.arch, padded)))
    missing = [(name, sm(arch), d) for (name, arch, d), tile in tuning.TABLE.items() if (arch, d, tile) not in compiled]
    assert not missing, missing


def test_every_known_spill_is_of_a_case():
    assert STACK.keys() <= {str(case) for case in (*ATTENTION, *QUANTISERS)}
