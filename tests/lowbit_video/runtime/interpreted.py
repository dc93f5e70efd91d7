"""The Triton kernels through the public API in Triton's CPU interpreter, on Paddle and torch tensors.

Not collected by itself: `test_runtime.py` runs it in a process with TRITON_INTERPRET=1, which Triton reads when a
kernel is defined.
"""
import os

import numpy as np
import pytest

from lowbit_video.engine.gpu import run_quantize
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.packing import Packing
from lowbit_video.engine.run import run
from lowbit_video.kernels.formats import scale_block
from lowbit_video.kernels.quant import reference
from lowbit_video.kernels.variants import VARIANTS
from lowbit_video.precision import Precision
from lowbit_video.runtime import detect

import quick_interpreter  # noqa: F401
from helpers import naive_attention, qkv, sqnr_db

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_runtime.py"
SPECS = sorted({spec for v in VARIANTS if v.backend == "triton" for spec in v.specs} - {"bf16", "fp32"})
"""All but exact attention in other dtypes than these tests' float16."""


def tensors(framework, *arrays, dtype="float16"):
    return [framework.tensor(a, dtype) for a in arrays]


def relative_l1(got, wanted):
    return np.abs(got - wanted).sum() / np.abs(wanted).sum()


@pytest.mark.parametrize("spec", SPECS)
def test_every_precision_matches_the_reference(framework, spec):
    q, k, v = tensors(framework, *qkv(heads=2, kv_heads=1, q_len=70, kv_len=131))
    got, got_lse, variant = run(q, k, v, AttentionOptions(spec, return_lse=True, is_causal=True, backend="triton"))
    wanted, wanted_lse, other = run(q, k, v, AttentionOptions(spec, return_lse=True, is_causal=True, backend="reference"))
    assert variant.backend == "triton" and other.backend == "reference"
    # a score that rounding puts on the other side of a code's edge moves single elements, not the sum
    assert relative_l1(framework.numpy(got), framework.numpy(wanted)) < 2e-3
    assert np.abs(framework.numpy(got_lse) - framework.numpy(wanted_lse)).max() < 2e-2


@pytest.mark.parametrize("spec", ["int4+fp16", "int4+fp8", "int8+fp8", "int8+fp16"])
def test_every_choice_of_smoothing_matches_the_reference(framework, spec):
    q, k, v = tensors(framework, *qkv(heads=2, kv_heads=1, q_len=20, kv_len=33, k_offset=1.0))
    for smooth_k, smooth_q in ((False, False), (False, True), (True, False), (True, True)):
        precision = Precision(spec, smooth_k=smooth_k, smooth_q=smooth_q)
        got, wanted = (run(q, k, v, AttentionOptions(precision, return_lse=True, backend=backend))[:2]
                       for backend in ("triton", "reference"))
        assert relative_l1(*map(framework.numpy, (got[0], wanted[0]))) < 4e-3
        assert np.abs(framework.numpy(got[1]) - framework.numpy(wanted[1])).max() < 2e-2


@pytest.mark.parametrize("spec, smooth_k", [("int4+fp16 rotate", True), ("int8/int4+fp8 rotate", False)])
def test_rotation_matches_the_reference(framework, spec, smooth_k):
    q, k, v = qkv(batch=2, heads=4, kv_heads=2, q_len=20, kv_len=33)
    k[..., 5] *= 10
    q, k, v = tensors(framework, q, k, v)
    precision = Precision(spec, smooth_k=smooth_k)
    (got, got_lse, variant), (wanted, wanted_lse, _) = (
        run(q, k, v, AttentionOptions(precision, return_lse=True, backend=backend)) for backend in ("triton", "reference"))
    assert variant.backend == "triton" and precision.rotate
    assert relative_l1(*map(framework.numpy, (got, wanted))) < 4e-3
    assert np.abs(framework.numpy(got_lse) - framework.numpy(wanted_lse)).max() < 2e-2
    plain = run(q, k, v, AttentionOptions(Precision(spec.removesuffix(" rotate"), smooth_k=smooth_k), backend="reference"))[0]
    assert relative_l1(*map(framework.numpy, (got, plain))) > 0.02


def test_rotation_of_packed_sequences(framework):
    q, k, v = (x[0] for x in qkv(heads=2, q_len=30, kv_len=41))
    k[..., 5] *= 10
    cu_q, cu_k = (framework.tensor(np.array(begins, np.int32), "int32") for begins in ((0, 9, 30), (0, 22, 41)))
    given = tensors(framework, q, k, v)
    got, wanted = (framework.numpy(run(*given, AttentionOptions("int8+fp16 rotate", backend=backend),
                                       Packing(cu_q, cu_k, 21, 22))[0]) for backend in ("triton", "reference"))
    assert relative_l1(got, wanted) < 4e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(framework, dtype):
    q, k, v = tensors(framework, *qkv(q_len=65), dtype=dtype)
    got, _, _ = run(q, k, v, AttentionOptions("int8+fp16", backend="triton"))
    wanted, _, _ = run(q, k, v, AttentionOptions("int8+fp16", backend="reference"))
    # the interpreter truncates float32 to bfloat16 where a GPU rounds
    assert str(got.dtype).endswith(dtype)
    assert relative_l1(framework.numpy(got), framework.numpy(wanted)) < (1e-2 if dtype == "bfloat16" else 1e-4)


def test_float32_v_beyond_float16_stays_finite(framework):
    q, k, v = qkv(q_len=40)
    v *= 1e5
    got, _, _ = run(*tensors(framework, q, k, v, dtype="float32"), AttentionOptions("int8+fp16", backend="triton"))
    assert relative_l1(framework.numpy(got), naive_attention(q, k, v)[0]) < 3e-2  # bfloat16's digits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_exact_attention_in_other_dtypes(framework, dtype):
    q, k, v = tensors(framework, *qkv(heads=2, kv_heads=1, q_len=33, kv_len=70), dtype=dtype)
    got, wanted = (run(q, k, v, AttentionOptions("exact", return_lse=True, backend=backend))
                   for backend in ("triton", "reference"))
    bound = 1e-2 if dtype == "bfloat16" else 1e-5  # the interpreter truncates P to bfloat16 where a GPU rounds
    assert got[2].name == "triton-exact" and str(got[0].dtype).endswith(dtype)
    assert relative_l1(*(framework.numpy(r[0]) for r in (got, wanted))) < bound
    assert np.abs(framework.numpy(got[1]) - framework.numpy(wanted[1])).max() < bound


@pytest.mark.parametrize("head_dim", [32, 40, 96])
def test_padded_head_dims(framework, head_dim):
    q, k, v = tensors(framework, *qkv(q_len=50, dim=head_dim))
    for spec in ("int8+fp8", "int4+fp16"):
        got, wanted = (framework.numpy(run(q, k, v, AttentionOptions(spec, backend=backend))[0])
                       for backend in ("triton", "reference"))
        assert relative_l1(got, wanted) < 2e-3


def test_layouts_and_strided_views_are_read_in_place(framework):
    arrays = qkv(q_len=65)
    wanted = framework.numpy(run(*tensors(framework, *arrays), AttentionOptions("int8+fp8", backend="triton"))[0])
    swapped = tensors(framework, *(a.transpose(0, 2, 1, 3) for a in arrays))
    hnd = framework.numpy(run(*swapped, AttentionOptions("int8+fp8", tensor_layout="HND", backend="triton"))[0])
    np.testing.assert_array_equal(hnd.transpose(0, 2, 1, 3), wanted)
    fused = framework.tensor(np.concatenate(arrays, 2), "float16")  # as one projection for q, k and v leaves them
    views = [fused[:, :, i:i + 2] for i in (0, 2, 4)]
    before = framework.numpy(fused).copy()
    np.testing.assert_array_equal(framework.numpy(run(*views, AttentionOptions("int8+fp8", backend="triton"))[0]), wanted)
    np.testing.assert_array_equal(framework.numpy(fused), before)


@pytest.mark.parametrize("operand", ["q", "k"])
@pytest.mark.parametrize("format", ["int8", "int4", "int2", "fp8"])
def test_quantise_writes_the_references_codes(framework, operand, format):
    x = framework.tensor(qkv(q_len=150)[1], "float16")
    runtime = detect.runtime_of(x)
    got = run_quantize(x, format=format, granularity="block", operand=operand, smooth=True, tensor_layout="NHD",
                       runtime=runtime)
    block = scale_block(operand, "block")
    array = framework.numpy(x).transpose(0, 2, 1, 3)
    mean = runtime.to_numpy(got["mean"])
    np.testing.assert_allclose(mean, array.mean(2), rtol=1e-5, atol=1e-6)
    scale = runtime.to_numpy(got["scale"])
    values = _decoded(runtime, got["codes"], format) * reference.expand_scale(scale, 150, block)[..., None] + mean[:, :, None]
    floor = {"int8": 35, "fp8": 28, "int4": 14, "int2": 5}[format]
    assert sqnr_db(values, array) > floor


def _decoded(runtime, codes, format):
    if format != "fp8":
        return reference.decode(runtime.to_numpy(codes), format)
    import ml_dtypes

    name = {"paddle": "uint8"}.get(runtime.NAME)
    if name is None:
        import torch as framework_module
    else:
        import paddle as framework_module
    return runtime.to_numpy(codes.view(framework_module.uint8)).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize("spec", ["int8+fp16", "int8+fp8", "int4+fp8", "fp16"])
def test_varlen_matches_the_reference(framework, spec):
    q_lengths, k_lengths = [70, 0, 1, 33, 5], [90, 3, 1, 0, 140]
    q, k, v = (a[0] for a in qkv(heads=2, kv_heads=1, q_len=sum(q_lengths), kv_len=sum(k_lengths)))
    q, k, v = tensors(framework, q, k, v)
    cu = [framework.tensor(np.repeat(np.cumsum([0, *lengths]), 2), "int32")[::2] for lengths in (q_lengths, k_lengths)]
    results = [run(q, k, v, AttentionOptions(spec, is_causal=True, return_lse=True, backend=backend), Packing(*cu, 70, 140))
               for backend in ("triton", "reference")]
    got, wanted = (framework.numpy(r[0]) for r in results)
    assert relative_l1(got, wanted) < 2e-3 and results[0][2].backend == "triton"
    got, wanted = (framework.numpy(r[1]) for r in results)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(wanted))
    assert np.abs(np.where(np.isinf(wanted), 0, got) - np.where(np.isinf(wanted), 0, wanted)).max() < 2e-2


def test_paddle_and_torch_give_the_same_bits_in_one_process():
    paddle, torch = pytest.importorskip("paddle"), pytest.importorskip("torch", reason="torch is not installed")
    arrays = [a.astype(np.float16) for a in qkv(q_len=40)]
    outs = [run(*(make(a) for a in arrays), AttentionOptions(Precision("int8+fp8"), backend="triton"))[0]
            for make in (paddle.to_tensor, torch.from_numpy, paddle.to_tensor)]
    for out in outs[1:]:
        np.testing.assert_array_equal(np.asarray(out), outs[0].numpy())
