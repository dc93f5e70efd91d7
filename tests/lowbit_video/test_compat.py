"""SageAttention's names: same arguments, this project's results, nothing swallowed."""
import inspect

import numpy as np
import pytest

from lowbit_video import attention, compat
from lowbit_video.precision import Precision

from helpers import naive_attention, qkv

DENSE = {
    "sageattn": "int8+fp16",
    "sageattn_qk_int8_pv_fp16_triton": "int8+fp16",
    "sageattn_qk_int4_pv_fp16_triton": "int4+fp16",
    "sageattn_qk_int8_pv_fp16_cuda": "int8+fp16",
    "sageattn_qk_int8_pv_fp8_cuda": "int8+fp8",
    "sageattn_multi_precision": "int8/int4+fp16",
}
SHARED = ("q", "k", "v", "tensor_layout", "is_causal", "sm_scale", "smooth_k", "return_lse")


def heads_first(framework, **shape):
    return [framework.tensor(a.transpose(0, 2, 1, 3), "float16") for a in qkv(**shape)]


@pytest.mark.parametrize("name", DENSE)
def test_it_is_attention_of_that_precision(framework, name):
    q, k, v = heads_first(framework, heads=4, kv_heads=2, q_len=40, kv_len=50)
    got, lse = getattr(compat, name)(q, k, v, is_causal=True, sm_scale=0.2, smooth_k=False, return_lse=True)
    precision = Precision(DENSE[name], smooth_k=False)
    wanted, wanted_lse = attention(q, k, v, precision, tensor_layout="HND", is_causal=True, scale=0.2, return_lse=True)
    np.testing.assert_array_equal(framework.numpy(got), framework.numpy(wanted))
    np.testing.assert_array_equal(framework.numpy(lse), framework.numpy(wanted_lse))


@pytest.mark.parametrize("name", DENSE)
def test_arguments_and_defaults_are_sageattentions(name):
    parameters = inspect.signature(getattr(compat, name)).parameters
    assert set(SHARED) <= set(parameters)
    assert parameters["tensor_layout"].default == "HND" and parameters["is_causal"].default is False
    assert parameters["sm_scale"].default is None and parameters["smooth_k"].default is True
    assert parameters["return_lse"].default is False
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())  # an unknown argument is a TypeError


@pytest.mark.parametrize("name", [*DENSE, "sageattn_varlen"])
def test_twins(name):
    assert getattr(compat, name.replace("sageattn", "lowbit_fa")) is getattr(compat, name)


def test_default_layout_is_heads_first(framework):
    arrays = qkv(heads=2, q_len=30)
    out = compat.sageattn(*(framework.tensor(a.transpose(0, 2, 1, 3), "float16") for a in arrays))
    same = compat.sageattn(*(framework.tensor(a, "float16") for a in arrays), tensor_layout="NHD")
    np.testing.assert_array_equal(framework.numpy(out).transpose(0, 2, 1, 3), framework.numpy(same))
    wanted = naive_attention(*arrays)[0]
    assert np.abs(framework.numpy(same) - wanted).sum() < 0.03 * np.abs(wanted).sum()


@pytest.mark.parametrize("name, arguments, message", [
    ("sageattn_qk_int8_pv_fp16_triton", {"quantization_backend": "cuda"}, "quantization_backend='cuda'"),
    ("sageattn_qk_int8_pv_fp16_triton", {"attn_mask": np.ones((20, 20))}, "attn_mask='ndarray' is not supported"),
    ("sageattn_qk_int4_pv_fp16_triton", {"attn_mask": np.ones((20, 20))}, "attn_mask"),
    ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp16"}, "never narrower; pass one of 'fp32'"),
    ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32+fp16"}, "pv_accum_dtype"),
    ("sageattn_qk_int8_pv_fp8_cuda", {"smooth_v": True}, "smooth_v=True"),
    ("sageattn_qk_int8_pv_fp16_cuda", {"qk_quant_gran": "per_galaxy"}, "there are: per_block, per_token"),
    ("sageattn_multi_precision", {"k_format": "int3"}, "int8/int4"),
    ("sageattn", {"tensor_layout": "BSHD"}, "'NHD'"),
])
def test_what_cannot_be_honoured_is_an_error(framework, name, arguments, message):
    q, k, v = heads_first(framework, q_len=20)
    with pytest.raises(ValueError, match=message):
        getattr(compat, name)(q, k, v, **arguments)
    with pytest.raises(TypeError):
        getattr(compat, name)(q, k, v, no_such_argument=1)


@pytest.mark.parametrize("granularity", ["per_block", "per_token", "per_warp", "per_thread"])
def test_granularity_is_never_coarser_than_asked(framework, granularity):
    q, k, v = heads_first(framework, q_len=140)
    got = compat.sageattn_qk_int8_pv_fp8_cuda(q, k, v, qk_quant_gran=granularity)
    ours = "block" if granularity == "per_block" else "token"
    wanted = attention(q, k, v, Precision("int8+fp8", granularity=ours), tensor_layout="HND")
    np.testing.assert_array_equal(framework.numpy(got), framework.numpy(wanted))


def test_varlen(framework):
    lengths = [7, 1, 22]
    cu = framework.tensor(np.cumsum([0, *lengths]), "int32")
    q, k, v = (a[0] for a in qkv(heads=2, q_len=30))
    out = framework.numpy(compat.sageattn_varlen(*(framework.tensor(a, "float16") for a in (q, k, v)), cu, cu, 22, 22))
    tensors = [framework.tensor(a, "float16") for a in (q, k, v)]
    same, lse = compat.sageattn_varlen(*tensors, cu, cu, 22, 22, return_lse=True)
    np.testing.assert_array_equal(framework.numpy(same), out)
    for begin, end in ((0, 7), (7, 8), (8, 30)):
        wanted, wanted_lse = naive_attention(*(a[None, begin:end] for a in (q, k, v)))
        assert np.abs(out[begin:end] - wanted[0]).sum() < 0.05 * np.abs(wanted).sum()
        assert np.abs(framework.numpy(lse)[:, begin:end] - wanted_lse[0]).max() < 0.05


DENSE_CALL = dict(tensor_layout="NHD", is_causal=True, sm_scale=0.3, smooth_k=False, return_lse=True)
OWN = {
    "sageattn_qk_int8_pv_fp16_cuda": dict(qk_quant_gran="per_thread", pv_accum_dtype="fp32+fp32"),
    "sageattn_qk_int8_pv_fp8_cuda": dict(qk_quant_gran="per_thread", pv_accum_dtype="fp32"),
    "sageattn_multi_precision": dict(q_format="int8", k_format="int2", pv_format="fp8", qk_quant_gran="per_block",
                                     smooth_q=True),
}
PRECISIONS = {
    "sageattn": {None: Precision("int8+fp16", smooth_k=False), (8, 0): Precision("int8+fp16", smooth_k=False),
                 (8, 9): Precision("int8+fp8", smooth_k=False), (9, 0): Precision("int8+fp8", smooth_k=False)},
    "sageattn_qk_int8_pv_fp16_triton": Precision("int8+fp16", smooth_k=False),
    "sageattn_qk_int4_pv_fp16_triton": Precision("int4+fp16", smooth_k=False),
    "sageattn_qk_int8_pv_fp16_cuda": Precision("int8+fp16", "token", smooth_k=False),
    "sageattn_qk_int8_pv_fp8_cuda": Precision("int8+fp8", "token", smooth_k=False),
    "sageattn_multi_precision": Precision("int8/int2+fp8", "block", smooth_k=False, smooth_q=True),
}


@pytest.mark.parametrize("arch", [None, (8, 0), (8, 9), (9, 0)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_every_argument_is_passed_on(name, arch, monkeypatch):
    """At values that are not their defaults, on a CPU and on GPUs with and without FP8."""
    monkeypatch.setattr(compat, "attention", lambda *tensors, **choices: (tensors, choices))
    monkeypatch.setattr(compat, "_arch", lambda q: arch)
    (q, k, v, precision), choices = getattr(compat, name)("q", "k", "v", **DENSE_CALL, **OWN.get(name, {}))
    wanted = PRECISIONS[name]
    assert (q, k, v) == ("q", "k", "v") and precision == (wanted[arch] if isinstance(wanted, dict) else wanted)
    backend = {"backend": "triton" if arch else "auto"} if name.endswith("_triton") else {}
    assert choices == dict(tensor_layout="NHD", is_causal=True, scale=0.3, return_lse=True) | backend


def test_every_argument_of_packed_sequences_is_passed_on(monkeypatch):
    monkeypatch.setattr(compat, "attention_varlen", lambda *given, **choices: (given, choices))
    given, choices = compat.sageattn_varlen(*"qkvab", 5, 6, is_causal=True, sm_scale=0.3, smooth_k=False, return_lse=True)
    assert given == (*"qkvab", 5, 6)
    assert choices == dict(precision=Precision("int8+fp16", smooth_k=False), is_causal=True, scale=0.3, return_lse=True)


@pytest.mark.parametrize("name, choices, words", [
    ("sageattn", dict(smooth_k="no"), "smooth_k is 'no'"), ("sageattn", dict(smooth_k=np.array([1, 2])), "smooth_k is array"),
    ("sageattn_qk_int8_pv_fp8_cuda", dict(qk_quant_gran=[]), r"qk_quant_gran=\[\] is unknown"),
    ("sageattn_qk_int8_pv_fp8_cuda", dict(pv_accum_dtype=np.array(["fp32", "fp16"])), "pv_accum_dtype=array"),
    ("sageattn_multi_precision", dict(q_format=np.array([1, 2])), "q_format=array"),
    ("sageattn_multi_precision", dict(k_format=None), "k_format=None"),
    ("sageattn_multi_precision", dict(smooth_q=2), "smooth_q is 2")])
def test_choices_of_no_kind_are_refused_by_name(framework, name, choices, words):
    with pytest.raises((ValueError, TypeError), match=words):
        getattr(compat, name)(*heads_first(framework, q_len=4), **choices)
