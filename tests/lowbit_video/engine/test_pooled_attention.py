"""Pooled attention by the public call, on a CPU: what it computes, on tensors of both frameworks, and what it refuses."""
import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.engine.checks import request_of
from lowbit_video.engine.codes import why_no_codes
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.packing import Packing
from lowbit_video.engine.run import run
from lowbit_video.engine.select import select
from lowbit_video.engine.workspace import layout_workspace
from lowbit_video.kernels.attention.reference import lowbit_attention
from lowbit_video.kernels.variants import VARIANTS, Request
from lowbit_video.runtime.detect import runtime_of
from pooled_inputs import smooth_qkv


def nhd(*arrays):
    return [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_call_is_the_oracle(framework, layout):
    given = smooth_qkv((2, 2, 400, 64), 1, 300)
    tensors = [framework.tensor(x) for x in (given if layout == "HND" else nhd(*given))]
    out, lse = lv.attention(*tensors, "int8+fp8", layout, scale=0.2, return_lse=True, pooled=lv.Pooled((0.5, 0.4), 20))
    wanted, wanted_lse = lowbit_attention(*given, q_format="int8", k_format="int8", pv_format="fp8", scale=0.2, keep=(0.5, 0.4),
                                          always=20)
    out = framework.numpy(out)
    np.testing.assert_allclose(out if layout == "HND" else out.swapaxes(1, 2), wanted, atol=1e-6)
    np.testing.assert_allclose(framework.numpy(lse), wanted_lse, atol=1e-5)


def test_all_kept_is_attention_without_pooling(framework):
    q, k, v = (framework.tensor(x) for x in nhd(*smooth_qkv((1, 2, 300, 64))))
    whole = framework.numpy(lv.attention(q, k, v, "int8+fp8"))
    np.testing.assert_array_equal(framework.numpy(lv.attention(q, k, v, "int8+fp8", pooled=lv.Pooled(1.0, 5))), whole)
    assert not np.array_equal(framework.numpy(lv.attention(q, k, v, "int8+fp8", pooled=lv.Pooled(0.5))), whole)


def test_text_at_the_beginning_is_as_without_pooling(framework):
    """As queries: rows of tiles that hold text see every key."""
    q, k, v = (framework.tensor(x) for x in nhd(*smooth_qkv((1, 1, 500, 64))))
    whole, some = (framework.numpy(lv.attention(q, k, v, "int8+fp16", pooled=pooled))
                   for pooled in (None, lv.Pooled(0.2, 193)))
    np.testing.assert_allclose(some[:, :384], whole[:, :384], atol=1e-6)
    assert np.abs(some[:, 384:] - whole[:, 384:]).max() > 1e-3


@pytest.mark.parametrize("change, message", [
    (dict(is_causal=True), "pooled keys are not supported with is_causal"), (dict(precision="exact"), "low-bit ones only"),
    (dict(precision="fp16"), "low-bit ones only|exact attention in fp16"),
    (dict(precision="int8+fp8 rotate"), "pooled keys are not supported with rotation")])
def test_refuses_by_name(framework, change, message):
    q = framework.tensor(np.zeros((1, 20, 2, 64), np.float32))
    with pytest.raises(lv.UnsupportedError, match=message):
        lv.attention(q, q, q, **(dict(precision="int8+fp8", pooled=lv.Pooled(0.3)) | change))


def test_refuses_packed_sequences_shares_of_other_heads_and_what_is_no_pooled(framework):
    q = framework.tensor(np.zeros((1, 20, 2, 64), np.float32))
    with pytest.raises(ValueError, match="3 shares, and q has 2 heads"):
        lv.attention(q, q, q, "int8+fp8", pooled=lv.Pooled((0.3, 0.3, 0.3)))
    with pytest.raises(TypeError, match="give None, or Pooled"):
        lv.attention(q, q, q, "int8+fp8", pooled=0.3)
    runtime = runtime_of(q)
    cu = runtime.from_numpy(np.array([0, 20], np.int32), q, "int32")
    with pytest.raises(lv.UnsupportedError, match="packed sequences"):
        run(q[0], q[0], q[0], AttentionOptions("int8+fp8", pooled=lv.Pooled(0.3)), Packing(cu, cu, 20, 20))


def test_codes_cannot_be_chosen_from(framework):
    q = framework.tensor(np.zeros((1, 20, 2, 64), np.float32))
    options = AttentionOptions("int8+fp8", pooled=lv.Pooled(0.3))
    assert why_no_codes(q, q, q, options, runtime_of(q)) == "what to pool is chosen by tensors, not by codes"


def gpu_request(**changes):
    given = dict(device="cuda", arch=(9, 0), q="int8", k="int8", pv="fp8", granularity="block", dtype="float16", head_dim=64,
                 q_len=17776, kv_len=17776, heads=30, kv_heads=30, lse=True, pooled=True)
    return Request(**given | changes)


def test_which_variants_serve():
    pytest.importorskip("triton", reason="Triton is not installed: no other variant serves a GPU")
    assert select(gpu_request()).name == "hopper-int8" and select(gpu_request(q="fp8", k="fp8")).name == "hopper-fp8"
    assert select(gpu_request(arch=(8, 9))).name == "triton-int-fp8"
    reasons = {variant.name: variant.why_not(gpu_request(causal=True)) for variant in VARIANTS}
    assert "is_causal" in reasons["hopper-int8"] and "is_causal" in reasons["triton-int-fp8"]


def test_short_sequences_are_refused_where_only_what_is_faster_is_wanted():
    pytest.importorskip("triton", reason="Triton is not installed: no other variant serves a GPU")
    short = gpu_request(kv_len=4000, only_if_faster=True)
    assert all("choosing what to pool costs more" in variant.why_not(short) for variant in VARIANTS
               if variant.name in ("hopper-int8", "triton-int-fp8"))
    assert select(gpu_request(only_if_faster=True)).name == "hopper-int8"
    assert select(gpu_request(kv_len=4000)).name == "hopper-int8"


def test_no_kernel_that_pools_is_shipped(monkeypatch):
    from lowbit_video.kernels.shipped import choice

    monkeypatch.setattr(choice, "chosen", lambda: choice.Choice(True, False, "why"))
    hopper = next(variant for variant in VARIANTS if variant.name == "hopper-int8")
    assert hopper.why_not(gpu_request(pooled=False)) is None
    assert hopper.why_not(gpu_request()) == "nothing is compiled: why"


def test_a_request_says_whether_keys_are_pooled(framework):
    q = framework.tensor(np.zeros((1, 20, 2, 64), np.float32))
    for pooled, wanted in ((None, False), (lv.Pooled(0.3), True), (lv.Pooled(1.0), False)):
        assert request_of(q, q, q, AttentionOptions("int8+fp8", pooled=pooled), None, runtime_of(q)).pooled is wanted


@pytest.mark.parametrize("spec", ["int8+fp8", "int8+fp16", "int4+fp8"])
def test_parts_of_the_workspace_lie_apart(spec):
    """Each begins where the one before has ended, by its own size; scratch of passes that are not made is not there."""
    precision = lv.Precision(spec)
    layout = layout_workspace((2, 6, 1000, 64), (2, 3, 700, 64), precision, True, pooled="float16")
    sizes = dict(float32=4, int32=4, float16=2)
    places = sorted((offset, offset + int(np.prod(shape)) * sizes.get(dtype, 1))
                    for offset, dtype, shape in layout.parts.values())
    assert all(end <= begin for (_, end), (begin, _) in zip(places, places[1:])) and places[-1][1] <= layout.size
    assert layout.parts["listed"][1:] == ("int32", (2, 6, 6, 6)) and layout.parts["pooled_keys"][2] == (2, 3, 6, 64)
    assert ("partial" in layout.parts) == precision.smooth_q and ("listed_scale" in layout.parts) == (spec[:4] == "int8")


def test_in_a_graph(framework):
    """What is chosen of the call travels in the graph's operator as text."""
    pooled = lv.Pooled((0.3, 0.5), 10)
    q, k, v = (framework.tensor(x) for x in nhd(*smooth_qkv((1, 2, 300, 64))))

    def call(q, k, v):
        return lv.attention(q, k, v, "int8+fp8", pooled=pooled)

    if framework.name == "torch":
        import torch

        graph, free = torch.compile(call, fullgraph=True, backend="eager"), torch.no_grad
    else:
        import paddle

        graph, free = paddle.jit.to_static(call, full_graph=True), paddle.no_grad
    with free():
        np.testing.assert_array_equal(framework.numpy(graph(q, k, v)), framework.numpy(call(q, k, v)))
