"""Small models of diffusers' real classes by `set_attention_backend`: near exact, reported, and as before afterwards."""
import copy
import dataclasses
import re
import threading

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend  # noqa: E402
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry  # noqa: E402

from dispatch_models import MODELS, attention_names, cogvideox, make, predict, state  # noqa: E402
from lowbit_video import UnsupportedError, apply, coverage, register_diffusers, remove, unregister_diffusers  # noqa: E402
from lowbit_video.engine.checks import request_of  # noqa: E402
from lowbit_video.engine.select import select  # noqa: E402
from lowbit_video.hook.dispatcher import attention as dispatched  # noqa: E402
from lowbit_video.hook.dispatcher import watch  # noqa: E402
from lowbit_video.runtime import torch_runtime  # noqa: E402

from helpers import sqnr_db  # noqa: E402

pytestmark = pytest.mark.parity
INT8, INT4 = "lowbit_int8_fp8", "lowbit_int4_fp16"

RAN = {"wan": {"int8+fp8 (reference-lowbit)": 4},
       "hunyuan": {"int8+fp8 (reference-lowbit, leading keys)": 2},
       "ltx": {"int8+fp8 (reference-lowbit)": 2, "exact (masked)": 2},
       "flux": {"int8+fp8 (reference-lowbit)": 2}}
"""Calls of one prediction."""
BYPASSING = {"context_embedder.token_refiner.refiner_blocks.0.attn"}
"""HunyuanVideo's refiner of 24 to 256 text tokens: its processor calls torch's attention itself."""


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_near_exact_reported_whole_and_as_before_afterwards(name):
    before = state()
    model, inputs = make(name)
    exact = predict(model, inputs)
    register_diffusers(model)
    register_diffusers(model)  # twice is once
    assert torch.equal(predict(model, inputs), exact)  # watched, and nothing else
    assert coverage(model).summary().endswith(f"({len(attention_names(model))} exact)")
    model.set_attention_backend(INT8)
    int8 = sqnr_db(predict(model, inputs), exact)
    assert 35 < int8 < 90
    report = coverage(model)
    assert {m.name for m in report.modules} == attention_names(model) and report.variants() == RAN[name]
    for module in (m for m in report.modules if m.name not in BYPASSING):
        assert module.hooked and f"backend {INT8}" in module.processor and module.calls == 1
        assert all(bool(reason) == what.startswith("exact") for what, _, reason in module.runs)
    model.set_attention_backend(INT4)
    assert 20 < sqnr_db(predict(model, inputs), exact) < int8 - 5
    unregister_diffusers(model)
    assert torch.equal(predict(model, inputs), exact)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(hasattr(module, "attention_calls") for module in model.modules())
    unregister_diffusers()
    assert state() == before


def test_the_report_says_what_was_not_low_bit_and_why():
    model, inputs = make("ltx")
    register_diffusers(model)
    model.set_attention_backend(INT8)
    predict(model, inputs)
    assert coverage(model).modules[1].runs == (
        ("exact (masked)", 1, "the mask is torch.float32; low bit serves boolean masks of leading keys alone, "
                              "[1, 1, 1, 24] or [1, 24]"),)
    assert coverage(model).summary() == "2 of 4 attention modules ran at low bit in every call (2 fell back)"
    model, _ = make("hunyuan")
    (bypassing,) = (m for m in coverage(model).modules if m.name in BYPASSING)
    assert bypassing.reason == f"not hooked: its processor bypasses diffusers' dispatcher, so '{INT8}' does nothing here"


def test_a_strict_backend_names_the_module_that_it_cannot_serve():
    model, inputs = make("ltx")
    register_diffusers(model)
    model.set_attention_backend(INT8 + "_strict")
    with pytest.raises(UnsupportedError, match=f"{INT8}_strict, attention module 'transformer_blocks.0.attn2': the mask"):
        predict(model, inputs)


def test_the_context_is_as_good_as_the_method():
    model, inputs = make("wan")
    exact = predict(model, inputs)
    register_diffusers(model)
    model.set_attention_backend(INT8)
    wanted = predict(model, inputs)
    unregister_diffusers(model)
    register_diffusers(model)
    with attention_backend(INT8):
        assert torch.equal(predict(model, inputs), wanted)
    assert torch.equal(predict(model, inputs), exact)
    assert [m.calls for m in coverage(model).modules] == [1] * 4 and all(m.hooked for m in coverage(model).modules)


def test_the_backend_of_before_comes_back():
    """diffusers' own reset leaves the process with the backend that was set last:
    https://github.com/huggingface/diffusers/issues/14249."""
    model, _ = make("flux")
    other, inputs = make("wan")
    exact = predict(other, inputs)
    model.set_attention_backend("_native_math")
    Registry.set_active_backend(AttentionBackendName.NATIVE)
    register_diffusers(model)
    model.set_attention_backend(INT8)
    assert not torch.equal(predict(other, inputs), exact)  # the other model has no backend of its own
    assert f"backend {INT8}" in coverage(other).modules[0].processor  # and its report says so
    assert "register_diffusers(model) before the run counts its calls" in coverage(other).modules[0].reason
    unregister_diffusers(model)
    assert torch.equal(predict(other, inputs), exact)
    assert {m.processor._attention_backend.value for m in model.modules() if hasattr(m, "processor")} == {"_native_math"}


def test_a_backend_that_was_chosen_since_stays():
    model, _ = make("wan")
    register_diffusers(model)
    model.set_attention_backend(INT8)
    Registry.set_active_backend(AttentionBackendName.NATIVE)
    assert f"backend {INT8}" in coverage(model).modules[0].processor  # its own comes before the process's
    model.set_attention_backend("_native_math")
    unregister_diffusers(model)
    assert {m.processor._attention_backend.value for m in model.modules() if hasattr(m, "processor")} == {"_native_math"}
    unregister_diffusers()
    assert Registry._active_backend.value == "_native_math"
    Registry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize("before", ["_native_math", "native"])  # one after the other: what was before is remembered anew
def test_the_process_has_its_own_backend_back_when_the_last_model_is_given_back(before):
    (one, inputs), (other, _) = make("wan"), make("wan")
    Registry.set_active_backend(AttentionBackendName(before))
    try:
        register_diffusers(one, other)
        one.set_attention_backend(INT8)
        unregister_diffusers(one)
        assert Registry._active_backend.value == INT8
        predict(other, inputs)
        assert [m.calls for m in coverage(other).modules] == [1] * 4  # which is counted still
        unregister_diffusers(other)
        assert Registry._active_backend.value == before
        unregister_diffusers()
    finally:
        Registry.set_active_backend(AttentionBackendName.NATIVE)


def test_another_threads_calls_are_not_the_modules():
    model, inputs = make("wan")
    register_diffusers(model)
    seen = []

    def look(*what):
        thread = threading.Thread(target=lambda: seen.append(watch.calling()))
        thread.start()
        thread.join()
        seen.append(watch.calling())

    hook = model.blocks[0].attn1.to_q.register_forward_hook(look)
    predict(model, inputs)
    hook.remove()
    assert seen[0] is None and watch.caller_of(seen[1]).record.name == "blocks.0.attn1"


def test_a_model_with_a_backend_of_diffusers_is_reported_as_that():
    model, _ = make("wan")
    assert {m.reason for m in coverage(model).modules} == {"not hooked: it has a backend of diffusers"}


def test_a_module_that_dispatches_is_reported_whatever_its_projections_are_called():
    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv, self.processor = torch.nn.Linear(2, 6), type("Processor", (), {"_attention_backend": None})()

    (row,) = coverage(torch.nn.Sequential(Fused())).modules
    assert row.name == "0" and row.processor == "Processor, backend native"


def test_the_names_stay_while_a_model_outside_uses_them():
    model, inputs = make("wan")
    register_diffusers()
    model.set_attention_backend(INT8)
    with pytest.raises(ValueError, match="class WanAttention still have a backend of lowbit_video; call reset_att"):
        unregister_diffusers()
    predict(model, inputs)
    model.reset_attention_backend()
    unregister_diffusers()
    register_diffusers(model)
    model.set_attention_backend(INT8)
    unregister_diffusers()  # what is watched is given back with the names
    assert {m.processor._attention_backend for m in model.modules() if hasattr(m, "processor")} == {None}


def test_a_model_that_bypasses_the_dispatcher_is_refused_and_reported():
    """diffusers takes the backend, changes nothing in this model, and changes every other one."""
    before, model = state(), cogvideox()
    with pytest.raises(UnsupportedError, match=r"no attention of CogVideoXTransformer3DModel goes through diffusers' disp.*"
                                               r"try lowbit_video.apply\(model\)"):
        register_diffusers(make("wan")[0], model)
    assert state() == before
    register_diffusers()
    model.set_attention_backend(INT8)
    (row,) = coverage(model).modules
    assert row.reason == f"not hooked: its processor bypasses diffusers' dispatcher, so '{INT8}' does nothing here"
    apply(model, "int8+fp8")
    assert coverage(model).modules[0].hooked
    remove(model)
    with pytest.raises(UnsupportedError, match="this model asks diffusers' dispatcher for its attention: .*docs/diffusers.md"):
        apply(make("wan")[0], "int8+fp8")


def test_a_pipeline_means_its_transformers():
    class Pipe:
        transformer, transformer_2 = make("wan")[0], make("wan")[0]

    register_diffusers(Pipe)
    Pipe.transformer_2.set_attention_backend(INT8)
    predict(Pipe.transformer_2, make("wan")[1])
    rows = {m.full_name: m.calls for m in coverage(Pipe).modules}
    assert len(rows) == 8 and rows["transformer_2.blocks.1.attn2"] == 1 and rows["transformer.blocks.1.attn2"] == 0
    unregister_diffusers(Pipe)
    assert not any(hasattr(module, "attention_calls") for module in Pipe.transformer_2.modules())


def test_where_exact_attention_is_faster_it_runs_and_the_report_says_so(monkeypatch):
    def as_on_a_gpu(q, k, v, options):
        request = request_of(q, k, v, options, None, torch_runtime)
        select(dataclasses.replace(request, device="cuda", arch=(9, 0), dtype="bfloat16"), options.backend)
        raise RuntimeError("low bit is served")

    model, inputs = make("wan")
    exact = predict(model, inputs)
    register_diffusers(model)
    monkeypatch.setattr(dispatched, "run", as_on_a_gpu)
    model.set_attention_backend(INT8)
    assert torch.equal(predict(model, inputs), exact)
    ((what, calls, reason),) = coverage(model).modules[1].runs
    assert (what, calls) == ("exact", 1) and re.search(r"exact attention is faster below \d+ tokens \(40 given\)", reason)
    model.set_attention_backend(INT8 + "_strict")
    with pytest.raises(RuntimeError, match="low bit is served"):
        predict(model, inputs)


def test_calls_of_a_model_that_is_not_watched_are_nobodys():
    model, inputs = make("wan")
    other, _ = make("wan")
    register_diffusers(model)
    with attention_backend(INT8):
        predict(model, inputs)
        predict(other, inputs)
    assert [m.calls for m in coverage(model).modules] == [1] * 4 and coverage(other).variants() == {}


def test_a_copy_counts_for_itself_or_not_at_all():
    model, inputs = make("wan")
    register_diffusers(model)
    model.set_attention_backend(INT8)
    wanted = predict(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(predict(twin, inputs), wanted)
    assert [m.calls for m in coverage(model).modules] == [1] * 4
    assert "not counted" in coverage(twin).modules[0].reason
    register_diffusers(twin)
    predict(twin, inputs)
    assert [m.calls for m in coverage(model).modules] == [m.calls for m in coverage(twin).modules] == [1] * 4
    del twin
