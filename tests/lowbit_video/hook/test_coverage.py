"""The coverage report: every attention module, what ran, how often, or why not."""
import json
import types

import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import LowBitAttnProcessor, apply, coverage, remove  # noqa: E402

import toy_model  # noqa: E402


def run(model, times=1):
    with paddle.no_grad():
        for _ in range(times):
            model(**toy_model.inputs())


def test_a_hooked_model_counts_variant_and_calls_per_module():
    model = toy_model.model()
    apply(model, "int8+fp16", {"blocks.1": "int4+fp8"})
    run(model, 3)
    report = coverage(model)
    assert [(m.name, m.calls, m.hooked) for m in report.modules] == [("blocks.0", 3, True), ("blocks.1", 3, True)]
    assert report.modules[0].runs[0][0].startswith("int8+fp16") and report.modules[1].runs[0][0].startswith("int4+fp8")
    assert "reference-lowbit" in report.modules[0].runs[0][0]
    assert report.summary() == "2 of 2 attention modules ran at low bit in every call"
    assert "LowBitAttnProcessor(int4+fp8)" in str(report)


def test_one_shared_processor_counts_modules_apart():
    model = toy_model.model()
    processor = LowBitAttnProcessor("int8+fp16")
    for block in model.blocks:
        block.set_processor(processor)
    given = toy_model.inputs()
    with paddle.no_grad():
        model.blocks[0](given["video"], given["text"])
        model.blocks[0](given["video"], given["text"])
    assert [m.calls for m in coverage(model).modules] == [2, 0]
    assert coverage(model).modules[1].reason == "not called yet"
    assert "1 hooked but not called" in coverage(model).summary()
    processor.records.clear()
    assert [m.calls for m in coverage(model).modules] == [0, 0]


def test_fallbacks_say_why():
    model = toy_model.model(heads=4, head_dim=16)
    apply(model, "int8+fp16", {"blocks.1": "exact"}, fallback="exact")
    with paddle.no_grad():
        model(**toy_model.inputs(rotary_dim=16))
    report = coverage(model)
    assert [m.name for m in report.fallbacks] == ["blocks.0"]
    assert "head_dim 16" in str(report)
    assert report.summary() == "0 of 2 attention modules ran at low bit in every call (1 fell back, 1 exact)"


def test_a_module_that_fell_back_once_is_not_whole():
    model = toy_model.model()
    apply(model, "int8+fp16", fallback="exact")
    given, mask = toy_model.inputs(), -paddle.arange(2 * 47, dtype="float32").reshape([2, 47])  # hides none, weighs all
    with paddle.no_grad():
        model.blocks[0](given["video"], given["text"])
        for attention_mask in (None, mask):
            model.blocks[1](given["video"], given["text"], attention_mask=attention_mask)
    report = coverage(model)
    assert [(name, calls, bool(reason)) for name, calls, reason in report.modules[1].runs] == [
        ("int8+fp16 (reference-lowbit, fused prologue)", 1, False), ("exact (masked)", 1, True)]
    assert [m.name for m in report.fallbacks] == ["blocks.1"]
    assert report.summary() == "1 of 2 attention modules ran at low bit in every call (1 fell back)"
    assert report.variants() == {"int8+fp16 (reference-lowbit, fused prologue)": 2, "exact (masked)": 1}


def test_a_pipeline_names_what_is_untouched():
    pipe = toy_model.Pipe()
    apply(pipe, "int8+fp16")
    report = coverage(pipe)
    assert dict(report.untouched) == {"vae": 0, "text_encoder": 3}
    lines = str(report).splitlines()
    assert any(line.startswith("transformer.blocks.0") for line in lines)
    assert any(line.startswith("vae") and "no attention modules" in line for line in lines)
    assert any(line.startswith("text_encoder") and "3 attention modules" in line for line in lines)


def test_modules_are_named_as_the_pipeline_names_its_model():
    pipe = toy_model.Pipe()
    pipe.transformer, pipe.unet = None, pipe.transformer
    apply(pipe, "int8+fp16")
    assert [module.full_name for module in coverage(pipe).modules] == ["unet.blocks.0", "unet.blocks.1"]


def test_a_foreign_processor_is_said_not_to_be_counted():
    model = toy_model.model()
    model.blocks[0].set_processor(lambda attn, video, text, mask=None, rotary=None: (video, text))
    assert "not from lowbit_video" in coverage(model).modules[0].reason


def test_as_dict_goes_through_json():
    pipe = toy_model.Pipe()
    apply(pipe, "int8+fp16")
    run(pipe.transformer)
    data = json.loads(json.dumps(coverage(pipe).as_dict()))
    assert data["modules"][0]["module"] == "transformer.blocks.0" and data["modules"][0]["runs"][0]["calls"] == 1
    assert sum(data["variants"].values()) == 2


def test_something_that_is_no_model_is_refused():
    with pytest.raises(TypeError, match="neither a pipeline"):
        coverage({"transformer": 1})


def test_a_pipeline_without_its_transformer_is_told_so():
    pipe = types.SimpleNamespace(transformer=None)
    for use in (coverage, remove, lambda pipe: apply(pipe, "int8+fp16")):
        with pytest.raises(TypeError, match="made without its transformer, which is None"):
            use(pipe)
