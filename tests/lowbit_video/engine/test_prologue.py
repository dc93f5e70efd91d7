"""Attention whose norms and positions are computed on the way: the same as of tensors that had them, or a reason why not."""
from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import lowbit_video as lv
from interpreted_run import pass_in_the_interpreter
from lowbit_video.engine import prologue, prologue_apart
from lowbit_video.engine.checks import request_of
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.packing import Packing
from lowbit_video.engine.run import run
from lowbit_video.engine.workspace import layout_workspace
from lowbit_video.precision import Precision
from lowbit_video.runtime.detect import runtime_of
from prologue_inputs import by_hand, in_two, made_steps, projected


@pytest.mark.parametrize("precision, layout, kind, rotary", [
    ("int8+fp8", "NHD", "layer", (10, 140)), ("int4+fp16", "HND", "rms", None), ("int8+fp16", "NHD", None, (0, 150))], ids=str)
def test_it_is_attention_of_what_had_them(framework, precision, layout, kind, rotary):
    (q, k, v), steps = projected(framework), made_steps(framework, kind=kind, rotary=rotary)
    ready = by_hand(framework, q, k, steps)
    runtime = runtime_of(q)
    order = lambda x: x if layout == "NHD" else runtime.permute(x, (0, 2, 1, 3))
    before = framework.numpy(q)
    out, lse, _ = run(*map(order, (q, k, v)), AttentionOptions(precision, layout, return_lse=True), steps=steps)
    wanted, wanted_lse, _ = run(*map(order, (*ready, v)), AttentionOptions(precision, layout, return_lse=True))
    np.testing.assert_allclose(framework.numpy(out), framework.numpy(wanted), atol=2e-3)
    np.testing.assert_allclose(framework.numpy(lse), framework.numpy(wanted_lse), atol=2e-3)
    np.testing.assert_array_equal(framework.numpy(q), before)
    bare, *_ = run(*map(order, (q, k, v)), AttentionOptions(precision, layout))
    assert np.abs(framework.numpy(bare) - framework.numpy(wanted)).max() > 0.05


def test_values_are_looked_at_behind_the_norm(framework):
    """Where they are small again; one that is not finite is still found."""
    (q, k, v), steps = projected(framework), made_steps(framework)
    out, *_ = run(q * 1e18, k, v, AttentionOptions("int8+fp16"), steps=steps)
    assert np.isfinite(framework.numpy(out)).all()
    with pytest.raises(ValueError, match="q reaches"):
        run(q * 1e18, k, v, AttentionOptions("int8+fp16"))
    with pytest.raises(lv.NonFiniteError, match="k has"):
        run(q, k * float("nan"), v, AttentionOptions("int8+fp16"), steps=steps)


@pytest.mark.parametrize("options, reason", [
    (AttentionOptions("exact"), "exact attention does not quantise"), (AttentionOptions("int8+fp8 rotate"), "rotation needs"),
    (AttentionOptions("int8+fp8", pooled=lv.Pooled(0.5)), "pooling needs")], ids=str)
def test_what_is_not_fused(framework, options, reason):
    (q, k, v), steps = projected(framework, dim=64), made_steps(framework, dim=64)
    with pytest.raises(lv.UnsupportedError, match=f"cannot be fused with quantisation: {reason}"):
        run(q, k, v, options, steps=steps)


def test_packed_sequences_and_other_shapes_are_not_fused(framework):
    (q, k, v), steps = projected(framework), made_steps(framework)
    runtime, options = runtime_of(q), AttentionOptions("int8+fp16")
    cu = runtime.from_numpy(np.array([0, 150], np.int32), q, "int32")
    with pytest.raises(lv.UnsupportedError, match="packed sequences"):
        run(q[0], k[0], v[0], options, Packing(cu, cu, 150, 150), steps)
    with pytest.raises(lv.UnsupportedError, match="one shape is read"):
        run(q[:, :149], k, v, options, steps=steps)
    with pytest.raises(lv.UnsupportedError, match="one shape are read"):
        run(q, k, v[:, :149], options, steps=steps)


def test_steps_whose_tensors_do_not_fit(framework):
    (q, k, v), steps = projected(framework), made_steps(framework)
    runtime = runtime_of(q)
    norm, rotary = steps.q_norm, steps.rotary
    wide = framework.tensor(np.zeros((140, 64)))
    for changed, reason in (
            (dict(q_norm=norm._replace(weight=framework.tensor(np.ones(96)))), r"q_weight is \[96\], and \[32\] is read"),
            (dict(k_norm=steps.k_norm._replace(bias=framework.tensor(np.ones(32), "float64"))), "k_bias has dtype float64"),
            (dict(rotary=rotary._replace(cos=rotary.cos[:139])), r"cos is \[139, 32\], and \[140, 32\]"),
            (dict(rotary=rotary._replace(sin=framework.tensor(np.zeros((140, 32)), "float16"))), "sin has dtype float16"),
            (dict(rotary=rotary._replace(begin=11)), "do not lie among 150 tokens"), (dict(k_norm=None), "not of one kind")):
        reason_found = prologue.why_not(steps._replace(**changed), q, k, v, AttentionOptions("int8+fp16"), None, runtime)
        assert reason_found is not None and re.search(reason, reason_found), (reason, reason_found)
    if framework.name == "torch":
        strided = steps._replace(rotary=rotary._replace(cos=wide[:, :32]))
        assert "cos is not contiguous" in prologue.why_not(strided, q, k, v, AttentionOptions("int8+fp16"), None, runtime)
    assert prologue.why_not(steps, q, k, v, AttentionOptions("int8+fp16"), None, runtime) is None


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("seam", [1, 149])
def test_tokens_in_two_pieces(framework, layout, seam):
    """Are attention of all of them, to the bit; a value that is not finite is found in the second piece too."""
    qkv, steps = projected(framework), made_steps(framework)
    first, rest = in_two(framework, qkv, seam)
    order = lambda x: x if layout == "NHD" else runtime_of(x).permute(x, (0, 2, 1, 3))
    options = AttentionOptions("int8+fp8", layout, return_lse=True)
    whole = run(*map(order, qkv), options, steps=steps)
    pieces = run(*map(order, first), options, steps=steps._replace(rest=rest._make(map(order, rest))))
    for one, two in zip(whole[:2], pieces[:2]):
        np.testing.assert_array_equal(framework.numpy(two), framework.numpy(one))
    rest = rest._replace(v=rest.v * float("inf"))
    with pytest.raises(lv.NonFiniteError, match="v has"):
        run(*map(order, first), options, steps=steps._replace(rest=rest._make(map(order, rest))))


def test_pieces_that_are_not_read(framework):
    (q, k, v), steps = projected(framework), made_steps(framework)
    first, rest = in_two(framework, (q, k, v), 20)
    runtime = runtime_of(q)
    why = lambda rest, spec="int8+fp8", more=steps: prologue.why_not(
        more._replace(rest=rest), *first, AttentionOptions(spec), None, runtime)
    assert why(rest) is None
    assert "V in fp16 is read in one piece" in why(rest, "int8+fp16")
    assert "the rest of q, k and v is" in why(rest._replace(k=rest.k[:, 1:]))
    assert "the rest of q, k and v is" in why(rest._make(x[:, :, :2] for x in rest))
    assert "one of two pieces has no tokens" in why(rest._make(x[:, :0] for x in rest))
    assert "the rest of v is float16 on" in why(rest._replace(v=framework.tensor(framework.numpy(rest.v), "float16")))
    wide = framework.tensor(np.zeros((1, 130, 3, 64)))
    if framework.name == "torch":
        assert "the last dimension of the rest of k is not contiguous" in why(rest._replace(k=wide[..., ::2]))
    request = prologue.whole_request(request_of(*first, AttentionOptions("int8+fp8"), None, runtime),
                                     steps._replace(rest=rest), "NHD", runtime)
    assert (request.q_len, request.kv_len) == (150, 150)
    far = steps._replace(rotary=steps.rotary._replace(begin=11))
    assert "do not lie among 150 tokens" in why(rest, more=far)


def test_the_workspace_has_partials_of_tiles():
    shape = (2, 3, 300, 64)
    for precision, statistics in (("int8+fp8", 2), (Precision("int8+fp16", smooth_k=False), 0), ("int4+fp8", 3)):
        precision = Precision(precision) if isinstance(precision, str) else precision
        parts = layout_workspace(shape, shape, precision, False, fused=True).parts
        assert parts.get("partial", (0, "", (0,)))[2] == (statistics * 2 * 3 * 3 * 64,)


def test_calls_in_the_interpreter():
    pytest.importorskip("triton")
    pass_in_the_interpreter(Path(__file__).with_name("interpreted_prologue_calls.py"))


def test_which_steps_a_kernel_of_their_own_serves(framework, monkeypatch):
    """Where there is a GPU and Triton, of inference, and what the fused kernels know."""
    (q, k, _), steps = projected(framework), made_steps(framework)
    runtime, served = runtime_of(q), []
    monkeypatch.setattr(prologue_apart, "write_behind_steps", lambda *call: served.append(call) or call[:2])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    ask = lambda q=q, k=k, steps=steps: prologue_apart.behind_steps(q, k, steps, runtime)
    assert ask() is None
    monkeypatch.setattr(runtime, "is_cpu", lambda x: False)
    assert ask() == (q, k) and served == [(q, k, steps, runtime)]
    half = framework.tensor(framework.numpy(k), "float16")
    for why, call in (("no steps", dict(steps=prologue.Steps())), ("lengths", dict(k=k[:, 1:])), ("dtypes", dict(k=half)),
                      ("no tokens", dict(q=q[:, :0], k=k[:, :0], steps=steps._replace(rotary=None))),
                      ("norms", dict(steps=steps._replace(k_norm=None))),
                      ("tables", dict(steps=steps._replace(rotary=steps.rotary._replace(cos=steps.rotary.cos[1:]))))):
        assert ask(**call) is None, why
    monkeypatch.setattr(runtime, "wants_gradients", lambda *tensors: any(x is steps.k_norm.bias for x in tensors))
    assert ask() is None
    monkeypatch.setattr(runtime, "wants_gradients", lambda *tensors: False)
    assert ask() is not None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ask() is None
