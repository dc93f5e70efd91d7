"""Every portable kernel compiles for every arch with no GPU, does not spill, and uses the tensor cores it is meant to."""
from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

from lowbit_video.kernels.attention.portable import launch_attn_fwd  # noqa: E402
from lowbit_video.kernels.formats import QK_FORMATS  # noqa: E402
from lowbit_video.kernels.quant.quant_qk import launch_quant_qk  # noqa: E402
from lowbit_video.kernels.quant.quant_v import launch_quant_v  # noqa: E402
from lowbit_video.kernels.quant.token_stats import launch_kv_stats  # noqa: E402

from offline import buffer, compiling, resources  # noqa: E402

ARCHS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
SHARED_LIMIT = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""KiB of shared memory that one program can have."""
PRECISIONS = (  # q, k, pv, granularity, dtype
    ("int8", "int8", "fp16", "block", "float16"),
    ("int8", "int8", "fp16", "token", "bfloat16"),
    ("int8", "int8", "fp8", "block", "float16"),
    ("fp8", "fp8", "fp8", "block", "bfloat16"),
    ("fp8", "fp8", "fp16", "token", "float16"),
    ("int4", "int4", "fp16", "token", "float16"),
    ("int4", "int4", "fp8", "block", "bfloat16"),
    ("int2", "int2", "fp16", "token", "bfloat16"),
    ("int8", "int4", "fp8", "token", "float16"),
    ("int8", "int2", "fp16", "block", "float16"),
    ("fp16", "fp16", "fp16", "block", "float16"),
    ("bf16", "bf16", "fp16", "block", "bfloat16"),
)
STACK = {
    (("fp8", "fp8", "fp16", "token", "float16"), (9, 0), 128): 24,
    (("int4", "int4", "fp8", "block", "bfloat16"), (10, 0), 128): 16,
    (("int8", "int8", "fp16", "token", "bfloat16"), (12, 0), 64): 48,
    (("fp8", "fp8", "fp16", "token", "float16"), (12, 0), 128): 8,
    (("int4", "int4", "fp16", "token", "float16"), (12, 0), 64): 16,
    (("int2", "int2", "fp16", "token", "bfloat16"), (12, 0), 64): 24,
}
"""Bytes of stack that a kernel is known to spill, by (precision, arch, head dim); 0 where nothing stands here."""
QUANTISER_STACK = {(10, 0): 8}
"""The same of the quantisers, by arch."""


def launch(q, k, pv, granularity, dtype, arch, head_dim, **options):
    """The attention launch of 2 x 12 heads, 4 of keys, over odd lengths, as the public API makes it."""
    exact = q in ("fp16", "bf16", "fp32")
    q_shape, kv_shape = (2, 12, 17776, head_dim), (2, 4, 17776, head_dim)
    strides = lambda shape: (shape[1] * shape[2] * head_dim, head_dim, shape[1] * head_dim)
    given = lambda wanted: buffer("float32") if wanted else None
    smooth_q = q in ("int4", "int2")
    launch_attn_fwd(
        buffer(dtype), buffer(dtype), buffer(dtype), buffer(dtype), q_shape=q_shape, kv_shape=kv_shape, q_format=q, k_format=k,
        pv_format=pv, granularity=granularity, out_strides=strides(q_shape), q_strides=strides(q_shape),
        k_strides=strides(kv_shape), v_strides=strides(kv_shape), q_scale=given(not exact), k_scale=given(not exact),
        v_scale=given(pv == "fp8"), bias=given(smooth_q), sm_scale=0.1, arch=arch, **options)


def runs_on(q, pv, arch):
    return arch >= (8, 9) or "fp8" not in (q, pv)


def tensor_core_text(q, pv, arch):
    """What PTX must hold: the MMA of the scores, and that of P.V."""
    if arch == (9, 0):
        family = "wgmma.mma_async.sync.aligned.m64n"
    elif arch == (10, 0):
        return ["tcgen05.mma", "tcgen05.mma"] if q not in ("int8", "int4", "int2") else ["mma.sync", "tcgen05.mma"]
    else:
        family = "mma.sync.aligned.m16n8"
    scores = {"fp8": ".e4m3.e4m3", "fp16": ".f16.f16", "bf16": ".bf16.bf16"}.get(q, ".s8.s8")
    return [(family, scores), (family, ".e4m3.e4m3" if pv == "fp8" else "16")]


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a[0]}{a[1]}")
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}-{p[3]}-{p[4]}")
def test_attention_compiles(precision, arch):
    q, k, pv, granularity, dtype = precision
    if not runs_on(q, pv, arch):
        pytest.skip("FP8 tensor cores need sm_89")
    head_dim = 64 if PRECISIONS.index(precision) % 2 else 128
    with compiling(arch) as kernels:
        launch(*precision, arch, head_dim)
    (kernel,) = kernels
    used = resources(kernel)
    assert used["stack"] <= STACK.get((precision, arch, head_dim), 0), used
    assert used["shared"] <= SHARED_LIMIT[arch] * 1024, used
    lines = [line for line in kernel.asm["ptx"].splitlines() if "mma" in line]
    for wanted in tensor_core_text(q, pv, arch):
        parts = (wanted,) if isinstance(wanted, str) else wanted
        assert any(all(part in line for part in parts) for line in lines), (parts, set(lines))


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a[0]}{a[1]}")
def test_quantisers_compile(arch):
    shape, dtype = (2, 4, 17776, 128), "bfloat16"
    strides = (17776 * 4 * 128, 128, 4 * 128)
    float32 = buffer("float32")
    with compiling(arch) as kernels:
        launch_kv_stats(buffer(dtype), strides, buffer(dtype), strides, float32, float32, float32, shape=shape)
        for format in QK_FORMATS:
            if runs_on(format, "fp16", arch):
                for block in (128, None):
                    launch_quant_qk(buffer(dtype), strides, buffer("uint8"), float32, shape=shape, format=format,
                                    block=block, mean=float32, bias=float32, q_mean=float32, group=3)
        if arch >= (8, 9):
            launch_quant_v(buffer(dtype), strides, buffer("uint8"), float32, shape=shape)
    assert len(kernels) >= 8
    for kernel in kernels:
        assert resources(kernel)["stack"] <= QUANTISER_STACK.get(arch, 0)
        # rows come in as 16 bytes a thread
        assert "fold" in kernel.metadata.name or "v4.b32" in kernel.asm["ptx"]
