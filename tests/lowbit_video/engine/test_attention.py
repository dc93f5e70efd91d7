"""attention() on Paddle and torch tensors: layouts, dtypes, results and refusals."""
import re
import warnings

import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.engine import half
from lowbit_video.engine.checks import request_of
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.run import run
from lowbit_video.engine.select import select, warn_if_slower
from lowbit_video.errors import SlowerThanExactWarning
from lowbit_video.kernels import tuning, variants
from lowbit_video.kernels.variants import VARIANTS, KernelVariant, Request
from lowbit_video.precision import precision_specs
from lowbit_video.runtime.detect import runtime_of

from helpers import naive_attention, qkv, sqnr_db


def tensors(framework, *arrays, dtype="float32"):
    return [framework.tensor(a, dtype) for a in arrays]


@pytest.mark.parametrize("spec", precision_specs())
def test_every_precision_runs_in_both_layouts(framework, spec):
    arrays = qkv(heads=4, kv_heads=2, q_len=70, kv_len=90)
    expected, expected_lse = naive_attention(*arrays)
    out, lse = lv.attention(*tensors(framework, *arrays), spec, return_lse=True)
    assert list(out.shape) == [1, 70, 4, 64] and list(lse.shape) == [1, 4, 70]
    floor = 6.0 if "int2" in spec else 14.0 if "int4" in spec else 24.0 if "+" in spec else 100.0
    assert sqnr_db(framework.numpy(out), expected) > floor
    assert np.abs(framework.numpy(lse) - expected_lse).max() < 0.5
    swapped = lv.attention(*tensors(framework, *(a.transpose(0, 2, 1, 3) for a in arrays)), spec, tensor_layout="HND")
    np.testing.assert_array_equal(framework.numpy(swapped).transpose(0, 2, 1, 3), framework.numpy(out))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_of_the_result_is_that_of_q(framework, dtype):
    arrays = qkv(q_len=40)
    out, lse = lv.attention(*tensors(framework, *arrays, dtype=dtype), "int8+fp16", return_lse=True)
    assert str(out.dtype).endswith(dtype) and str(lse.dtype).endswith("float32")
    assert sqnr_db(framework.numpy(out), naive_attention(*arrays)[0]) > 33.0


def test_float32_v_beyond_float16_stays_finite(framework):
    q, k, v = qkv(q_len=40)
    v *= 1e5
    out = framework.numpy(lv.attention(*tensors(framework, q, k, v), "int8+fp16"))
    assert sqnr_db(out, naive_attention(q, k, v)[0]) > 33.0


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-8, 1e-30])
@pytest.mark.parametrize("spec", ["int8+fp16", "int4+fp16", "fp8+fp16", "int8+fp8"])
def test_float32_v_that_is_tiny_keeps_its_digits(framework, spec, size):
    q, k, v = qkv(heads=4, kv_heads=2, q_len=40, kv_len=70)
    relative = lambda v: sqnr_db(framework.numpy(lv.attention(*tensors(framework, q, k, v), spec)) / np.float32(size),
                                 naive_attention(q, k, v)[0] / np.float32(size))
    usual = sqnr_db(framework.numpy(lv.attention(*tensors(framework, q, k, v), spec)), naive_attention(q, k, v)[0])
    assert relative(v * np.float32(size)) > usual - 0.5
    v[..., ::2] *= np.float32(size)  # every other channel
    out, wanted = framework.numpy(lv.attention(*tensors(framework, q, k, v), spec)), naive_attention(q, k, v)[0]
    assert sqnr_db(out[..., ::2] / np.float32(size), wanted[..., ::2] / np.float32(size)) > usual - 1.5


def test_what_float16_holds_of_v_is_told_by_channel():
    v = np.ones((3, 2, 4), np.float32)
    assert half.fits_float16(v) and half.fits_float16(0 * v)
    v[..., 1] = 1e-7
    assert not half.fits_float16(v) and not half.fits_float16(1e5 * v)
    values, name, exponent = half.in_half(v[None])
    assert name == "fp16" and (exponent[..., 1] == -23).all() and not exponent[..., 0].any()
    np.testing.assert_allclose(np.ldexp(values, exponent), v[None], rtol=2**-11)
    np.testing.assert_array_equal(half.restored(values, exponent), np.ldexp(values, exponent))


def test_the_callers_tensors_are_not_changed(framework):
    arrays = qkv(q_len=50)
    given = tensors(framework, *arrays)
    lv.attention(*given, "int4+fp8", is_causal=True)
    for array, tensor in zip(arrays, given):
        np.testing.assert_array_equal(framework.numpy(tensor), array)


def test_strided_views(framework):
    q, k, v = qkv(q_len=50, heads=4)
    wide = framework.tensor(np.concatenate([q, k, v], axis=3))
    views = [wide[..., i * 64:(i + 1) * 64] for i in range(3)]
    np.testing.assert_array_equal(framework.numpy(lv.attention(*views)),
                                  framework.numpy(lv.attention(*tensors(framework, q, k, v))))


def test_scale_and_causal_reach_the_kernel(framework):
    arrays = qkv(q_len=60)
    out = lv.attention(*tensors(framework, *arrays), "int8+fp16", is_causal=True, scale=0.5)
    assert sqnr_db(framework.numpy(out), naive_attention(*arrays, scale=0.5, causal=True)[0]) > 25.0


@pytest.mark.parametrize("change, message", [
    (dict(tensor_layout="BHND"), "NHD.*HND"), (dict(backend="cuda"), "auto, hopper, triton, reference"),
    (dict(precision="int5+fp16"), "int8/int4"), (dict(backend="hopper"), "needs an NVIDIA GPU")])
def test_what_does_not_exist_is_an_error_that_lists_what_does(framework, change, message):
    with pytest.raises(ValueError, match=message):
        lv.attention(*tensors(framework, *qkv(q_len=8)), **change)


@pytest.mark.parametrize("shapes, message", [
    (((1, 0, 2, 64),) * 3, "at least one token"), (((1, 0, 2, 64), (1, 8, 2, 64), (1, 8, 2, 64)), "at least one token"),
    (((1, 8, 2, 64), (1, 8, 4, 64), (1, 8, 4, 64)), "multiple"), (((1, 8, 2, 64), (1, 8, 2, 64), (1, 9, 2, 64)), "one shape"),
    (((1, 8, 3, 64), (1, 8, 2, 64), (1, 8, 2, 64)), "multiple"), (((8, 2, 64),) * 3, "4 dimensions"),
    (((1, 8, 2, 64), (2, 8, 2, 64), (2, 8, 2, 64)), "batch"), (((1, 8, 2, 36),) * 3, "head_dim 36"),
    (((1, 8, 2, 24),) * 3, "head_dim 24"), (((1, 8, 2, 264),) * 3, "head_dim 264")])
def test_bad_shapes(framework, shapes, message):
    with pytest.raises(ValueError, match=message):
        lv.attention(*[framework.tensor(np.zeros(shape)) for shape in shapes])


@pytest.mark.parametrize("name, value", [("q", np.nan), ("k", np.inf), ("v", -np.inf)])
def test_nonfinite_input_is_named_and_counted(framework, name, value):
    arrays = dict(zip("qkv", qkv(q_len=20)))
    arrays[name][0, 3, 1, 5:8] = value
    given = tensors(framework, *arrays.values())
    with pytest.raises(lv.NonFiniteError, match=f"{name} has {'3 NaN and 0' if np.isnan(value) else '0 NaN and 3'} infinite"):
        lv.attention(*given)
    lv.attention(*given, check_finite=False)


@pytest.mark.parametrize("sizes, scale, words", [
    ((1e19, 1, 1), None, "q reaches .*e.19 and k .* scale is 0.125"), ((1, 1e30, 1), None, "k .*e.30"),
    ((1e16, 1e16, 1), None, "softmax in float32"), ((1, 1e16, 1), 1e15, "scale is 1e.15"),
    ((1e-29, 1, 1), -1e26, "smaller values"), ((1, 1, 1e37), None, "v reaches .*e.37")])
def test_magnitudes_beyond_the_softmax_are_refused(framework, sizes, scale, words):
    given = tensors(framework, *(x * np.float32(size) for x, size in zip(qkv(q_len=40), sizes)))
    for call in (lv.attention, lv.prequantize):
        with pytest.raises(ValueError, match=words):
            call(*given, scale=scale)
        call(*given, scale=scale, check_finite=False)


def test_a_mean_of_the_largest_float16_stays_finite(framework):
    q, k, v = qkv(q_len=200)
    given = tensors(framework, q, k, v * 0 + 65504, dtype="float16")
    outs = [lv.attention(*given, "int8+fp8"), lv.attention_of_codes(lv.prequantize(*given, "int8+fp8"))]
    assert all(np.isfinite(framework.numpy(out)).all() and framework.numpy(out).max() == 65504 for out in outs)


def test_mixed_dtypes_and_foreign_types_are_refused(framework):
    q, k, v = tensors(framework, *qkv(q_len=8))
    with pytest.raises(TypeError, match="one dtype"):
        lv.attention(q, framework.tensor(framework.numpy(k), "float16"), v)
    with pytest.raises(TypeError, match="paddle.to_tensor"):
        lv.attention(*qkv(q_len=8))


def test_tensors_on_two_devices_are_refused(framework, monkeypatch):
    q, k, v = tensors(framework, *qkv(q_len=8))
    runtime = runtime_of(q)
    monkeypatch.setattr(runtime, "place", lambda t: "gpu:1" if t is k else "gpu:0")
    with pytest.raises(ValueError, match="one device; given: q on gpu:0, k on gpu:1, v on gpu:0"):
        lv.attention(q, k, v)
    monkeypatch.undo()
    assert "cpu" in runtime.place(q)


def test_frameworks_do_not_mix():
    paddle, torch = pytest.importorskip("paddle"), pytest.importorskip("torch")
    q, k, v = qkv(q_len=8)
    with pytest.raises(TypeError, match="k is a torch tensor"):
        lv.attention(paddle.to_tensor(q), torch.from_numpy(k), torch.from_numpy(v))


def gpu_request(**change):
    return Request(**(dict(device="cuda", arch=(9, 0), q="int8", k="int8", pv="fp8", granularity="block", dtype="float16",
                           head_dim=64, q_len=1000, kv_len=1000) | change))


@pytest.mark.parametrize("change, reason", [
    (dict(device="cpu", arch=None), "needs an NVIDIA GPU"), (dict(arch=(8, 0)), "needs sm_89 or later; this GPU is sm_80"),
    (dict(head_dim=36), "head_dim 36"), (dict(dtype="float64"), "dtype float64"), (dict(q="int3"), "int3/int8"),
    (dict(pv="int8"), "P.V in int8")])
def test_why_not_gives_the_reason(change, reason):
    portable = next(v for v in VARIANTS if v.name == "triton-int-fp8")
    assert portable.why_not(gpu_request()) is None
    assert reason in portable.why_not(gpu_request(**change))


def test_lengths_at_which_exact_attention_is_faster_are_named():
    """On request: what is asked for by name runs at any length."""
    measured = {(v.name, pv) for v in VARIANTS if v.device == "cuda" and "exact" not in v.name for pv in v.pv}
    assert {(name, pv) for name, pv, arch, _ in tuning.FASTER_FROM if arch == (9, 0)} == measured - {("triton-fp8", "fp16")}
    for (name, pv, arch, head_dim), tokens in tuning.FASTER_FROM.items():
        variant = next(v for v in VARIANTS if v.name == name)
        q, k = variant.qk[0]
        request = dict(q=q, k=k, pv=pv, arch=arch, head_dim=head_dim)
        short, long = (gpu_request(kv_len=length, only_if_faster=True, **request) for length in (tokens - 1, tokens))
        assert variant.why_not(short) == f"exact attention is faster below {tokens} tokens ({tokens - 1} given)"
        assert variant.why_not(long) is None and variant.why_not(gpu_request(kv_len=1, **request)) is None


def test_selection_takes_the_first_fit_and_names_every_refusal():
    a, b = (KernelVariant(name, "triton", (("int8", "int8"),), ("fp8",), "m:f", min_arch=arch)
            for name, arch in (("new", (10, 0)), ("old", (8, 0))))
    assert select(gpu_request(), variants=(a, b)) is b
    assert select(gpu_request(arch=(10, 0)), variants=(a, b)) is a
    with pytest.raises(lv.UnsupportedError, match="new: it needs sm_100(.|\n)*old: it needs sm_80"):
        select(gpu_request(arch=(7, 5)), variants=(a, b))


@pytest.mark.parametrize("change, backend, says", [
    (dict(head_dim=30), "auto", r"serves int8\+fp8 \(float16, head_dim 30, .*\npad q, k and v with zeros to head_dim 32, give "
     r"scale=30\*\*-0.5 unless you have one, and take the output's first 30 channels, or give the processor fallback='exact'"),
    (dict(head_dim=30, q="int4", k="int4", rotate=True), "auto", r"serves int4\+fp8 rotate \(.*\npad .* to head_dim 64"),
    (dict(head_dim=96, k="int4", rotate=True), "auto", r"serves int8/int4\+fp8 rotate \(.*\nleave out the rotation, or pad "),
    (dict(pooled=True, causal=True), "auto", r"serves int8\+fp8, pooled \(.*\nleave out pooled, or leave out is_causal, or "
     "give the processor fallback='exact'; `lowbit-video kernels` lists"),
    (dict(q="fp16", k="fp16", pv="fp16", pooled=True), "auto", r"serves fp16, pooled \(.*\nleave out pooled, or give another "
     r"precision, such as 'int8\+fp16', or give the processor"),
    (dict(k="int4"), "hopper", r"give another precision, such as 'int8\+fp16', or give another backend, such as 'auto', or "),
    (dict(arch=(8, 0)), "auto", r"give another precision, such as 'int8\+fp16', or give the processor"),
    (dict(head_dim=300), "auto", r"\ngive the processor fallback='exact'; "),
    (dict(head_dim=60, kv_len=100_000, only_if_faster=True), "auto", r"\ngive the processor fallback='exact'; ")])
def test_a_refusal_says_what_would_be_served_instead(change, backend, says, monkeypatch):
    monkeypatch.setitem(variants.NEEDS, "gluon", lambda request: None)
    monkeypatch.setitem(variants.NEEDS, "triton", lambda request: None)
    monkeypatch.setattr(variants, "_compiled", lambda request: None)
    with pytest.raises(lv.UnsupportedError) as refused:
        select(gpu_request(**change), backend)
    assert re.search(says, re.sub(r"(?m)^  .*\n", "", str(refused.value)))


def test_what_waits_for_its_measurement_is_taken_by_name_only():
    a, b = (KernelVariant(name, backend, (("int8", "int8"),), ("fp8",), "m:f", min_arch=(8, 0), automatic=name == "old")
            for name, backend in (("new", "hopper"), ("old", "triton")))
    assert select(gpu_request(), variants=(a, b)) is b
    assert select(gpu_request(), "hopper", variants=(a, b)) is a
    with pytest.raises(lv.UnsupportedError, match="new: it is taken where it is asked for by name only: backend='hopper'"):
        select(gpu_request(), variants=(a,))


@pytest.mark.parametrize("automatic", [False, True])
def test_exact_attention_goes_to_hopper_once_that_is_automatic(automatic, monkeypatch):
    hopper = next(v for v in VARIANTS if v.name == "hopper-exact")
    monkeypatch.setitem(vars(hopper), "automatic", automatic)
    exact = gpu_request(q="fp16", k="fp16", pv="fp16")
    assert select(exact).name == ("hopper-exact" if automatic else "triton-exact")
    assert select(exact, "hopper") is hopper and select(exact, "triton").name == "triton-exact"


def test_the_interpreter_serves_cpu_tensors_where_triton_is_asked_for_by_name():
    request = gpu_request(device="cpu", arch=None, interpret=True)
    assert select(request).name == "reference-lowbit" and select(request, "triton").name == "triton-int-fp8"
    with pytest.raises(lv.UnsupportedError, match="hopper-int8: it needs an NVIDIA GPU"):
        select(request, "hopper")


def test_features_a_variant_lacks_are_named():
    plain = KernelVariant("plain", "triton", (("int8", "int8"),), ("fp8",), "m:f", min_arch=(8, 0), features=frozenset())
    request = gpu_request(causal=True, lse=True, heads=4, kv_heads=2)
    assert plain.why_not(request) == "it does not support causal, lse, gqa"


def test_run_says_which_variant_ran(framework):
    q, k, v = tensors(framework, *qkv(q_len=16))
    assert run(q, k, v, AttentionOptions("int8+fp16"))[2].name == "reference-lowbit"
    assert run(q, k, v, AttentionOptions("exact"))[2].name == "reference-exact"
    request = request_of(q, k, v, AttentionOptions("int4+fp8", is_causal=True), None, runtime_of(q))
    assert (request.q_len, request.heads, request.head_dim, request.smooth_q, request.causal) == (16, 2, 64, True, True)


def test_a_length_at_which_exact_attention_is_faster_is_named():
    low_bit = next(v for v in VARIANTS if v.name == "triton-int-fp8")
    with pytest.warns(SlowerThanExactWarning, match=r"triton-int-fp8: exact attention is faster below \d+ tokens"):
        warn_if_slower(low_bit, gpu_request(kv_len=100))
    exact = next(v for v in VARIANTS if v.name == "triton-exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_slower(low_bit, gpu_request(kv_len=17776))
        warn_if_slower(low_bit, gpu_request(kv_len=100, arch=None))
        warn_if_slower(exact, gpu_request(kv_len=100, q="fp16", k="fp16", pv="fp16"))


def test_tensors_that_cannot_be_read_are_refused_before_anything_reads_them(framework):
    q, k, v = tensors(framework, *qkv(q_len=8))
    if framework.name == "torch":
        import torch

        odd = {"a torch.sparse_coo tensor": q.to_sparse(), "on meta": q.to("meta"),
               "a nested tensor": torch.nested.nested_tensor([q[0, :3], q[0, 3:]])}
    else:
        import paddle

        with paddle.LazyGuard():
            lazy = paddle.nn.Linear(4, 4).weight
        lazy.stop_gradient = True
        odd = {"a sparse tensor": q.to_sparse_coo(2), "without memory": lazy}
    calls = (lambda x: lv.attention(x, x, x), lambda x: lv.attention(q, k, x), lv.quantize, lambda x: lv.prequantize(x, x, x),
             lambda x: lv.attention_varlen(q[0], k[0], v[0], x, x, 8, 8))
    for words, x in odd.items():
        for call in calls:
            with pytest.raises(TypeError, match=f"^([qkvx]|cu_seqlens_q) is {words}; supported are dense tensors"):
                call(x)
