"""Gradients are refused, or flow through exact attention where the fallback allows it; inference asks for none."""
import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.distributed.group import Group
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.errors import UnsupportedError
from lowbit_video.runtime.detect import runtime_of
from ranks import run_threads

from helpers import qkv

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
import toy_model  # noqa: E402

REFUSED = r"gradients are asked for, and this attention is inference only(.|\n)*no_grad\(\), or train through exact attention"


def tensors(framework, wants):
    made = [framework.tensor(x) for x in qkv(q_len=40)]
    for name, tensor in zip("qkv", made):
        if framework.name == "torch":
            tensor.requires_grad_(name in wants)
        else:
            tensor.stop_gradient = name not in wants
    return made


def no_grad(framework):
    return paddle.no_grad() if framework.name == "paddle" else __import__("torch").no_grad()


@pytest.mark.parametrize("wants", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("precision", ["int8+fp16", "exact"])
def test_a_call_that_asks_for_gradients_is_refused(framework, wants, precision):
    given = tensors(framework, wants)
    with pytest.raises(UnsupportedError, match=REFUSED):
        lv.attention(*given, precision)
    with no_grad(framework):
        out = lv.attention(*given, precision)
    want = lv.attention(*tensors(framework, ""), precision)
    np.testing.assert_array_equal(framework.numpy(out), framework.numpy(want))


def test_packed_sequences_and_codes_are_refused_too(framework):
    given = tensors(framework, "k")
    with pytest.raises(UnsupportedError, match=REFUSED):
        lv.prequantize(*given)
    with pytest.raises(UnsupportedError, match=REFUSED):
        lv.quantize(given[1])
    assert lv.quantize(given[0]).codes.shape[2] == 40
    ends = framework.tensor([0, 40], "int32")
    with pytest.raises(UnsupportedError, match=REFUSED):
        lv.attention_varlen(*(x[0] for x in given), ends, ends, 40, 40)


@pytest.mark.parametrize("wrap", [ulysses, ring])
def test_tokens_shared_by_ranks_are_refused(framework, wrap):
    def work(wire):
        attend = lv.LowBitAttnProcessor("int4+fp16").attend  # whose codes travel, whatever the shares
        wrap(attend, Group(wire, range(2)), shares=[40, 40])(*tensors(framework, "v"))

    with pytest.raises(UnsupportedError, match=REFUSED):
        run_threads(2, work, patience=5)


def test_guidance_shared_by_ranks_is_refused(framework):
    def work(wire):
        q, k, _ = tensors(framework, "k")
        group, runtime = Group(wire, range(2)), runtime_of(q)
        assert len(group.all_gather(q, runtime, "guidance")) == 2
        group.all_gather(k, runtime, "guidance")

    with pytest.raises(UnsupportedError, match=REFUSED):
        run_threads(2, work, patience=5)


@pytest.mark.torch
def test_forward_gradients_are_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v = (torch.from_numpy(x) for x in qkv(q_len=40))
    for function in (torch.func.grad(lambda x: lv.attention(q, x, v).sum()),
                     lambda x: torch.func.jvp(lambda x: lv.attention(q, x, v), (x,), (x,))):
        with pytest.raises(UnsupportedError, match=REFUSED):
            function(k)


@pytest.mark.parametrize("pick", [lambda model: None, lambda model: {"blocks.1": "int8+fp16"}], ids=["all", "one"])
def test_training_with_a_hook_is_refused_and_named(pick):
    model, given = toy_model.model(), toy_model.inputs()
    lv.apply(model, None if pick(model) else "int8+fp16", pick(model))
    with pytest.raises(UnsupportedError, match=rf"attention module 'blocks..': {REFUSED}"):
        model(given["video"], given["text"])


def test_with_the_fallback_training_is_exact_and_told():
    given = toy_model.inputs()
    grads = []
    for hooked in (False, True):
        model = toy_model.model()
        if hooked:
            lv.apply(model, "int8+fp16", fallback="exact")
        sum(part.square().sum() for part in model(given["video"], given["text"])).backward()
        grads.append({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("to_q" in name for name in grads[0])
    for name, grad in grads[0].items():
        np.testing.assert_array_equal(grads[1][name], grad)
    report = lv.coverage(model)
    assert [run[0] for module in report.fallbacks for run in module.runs] == ["exact", "exact"]
    assert report.modules[0].runs[0][2] == "gradients are asked for, and this attention is inference only"
    with paddle.no_grad():
        model(given["video"], given["text"])
    assert "int8+fp16 (reference-lowbit, fused prologue)" in lv.coverage(model).variants()
