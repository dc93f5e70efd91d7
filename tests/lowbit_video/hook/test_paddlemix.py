"""PaddleMIX's later video models, by a double: each block's frame computes what the block's own processor does."""
import inspect

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
import lowbit_video as lv  # noqa: E402
from lowbit_video.hook import frames  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

import paddlemix_double as paddlemix  # noqa: E402
from helpers import sqnr_db  # noqa: E402

FLOOR_DB = 35
NAMES = list(paddlemix.MODELS)


def output(model, name, **changed):
    with paddle.no_grad():
        return model(**{**paddlemix.inputs(name), **changed}).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_each_frame_computes_what_the_models_own_processors_do(name):
    model = paddlemix.model(name)
    own = output(model, name)
    model.set_attn_processor(lv.ExactAttnProcessor())
    np.testing.assert_allclose(output(model, name), own, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_applied_it_runs_at_low_bit_and_removed_it_is_what_it_was(name):
    model = paddlemix.model(name)
    own, before = output(model, name), model.attn_processors
    lv.apply(model, "int8+fp16", fallback="exact")
    low = output(model, name)
    assert FLOOR_DB < sqnr_db(low, own) < 80
    report = lv.coverage(model)
    assert [module.name for module in report.modules] == list(attention_modules(model))
    assert all(module.calls for module in report.modules)
    assert lv.remove(model)
    assert model.attn_processors == before
    np.testing.assert_array_equal(output(model, name), own)


@pytest.mark.parametrize("name", NAMES)
def test_a_processor_set_by_the_model_runs_as_an_applied_one(name):
    model = paddlemix.model(name)
    with lv.apply(model, "int8+fp16", fallback="exact"):
        applied = output(model, name)
    model.set_attn_processor(lv.LowBitAttnProcessor("int8+fp16", fallback="exact"))
    np.testing.assert_array_equal(output(model, name), applied)


@pytest.mark.parametrize("name", NAMES)
def test_dicts_of_processors_are_emptied_and_nothing_is_lost(name):
    model = paddlemix.model(name)
    own, before = output(model, name), model.attn_processors
    handle = lv.apply(model, "int8+fp16", fallback="exact")
    low, given = output(model, name), dict.fromkeys(before, lv.LowBitAttnProcessor("int4+fp16", fallback="exact"))
    model.set_attn_processor(given)
    assert not given and not np.array_equal(output(model, name), low)
    handle.remove()
    assert model.attn_processors == before
    np.testing.assert_array_equal(output(model, name), own)
    model.set_attn_processor(dict.fromkeys(before, lv.LowBitAttnProcessor("int8+fp16", fallback="exact")))
    np.testing.assert_array_equal(output(model, name), low)
    model.set_attn_processor(before)
    np.testing.assert_array_equal(output(model, name), own)


@pytest.mark.parametrize("name", NAMES)
def test_positions_reach_the_attention(name):
    model = paddlemix.model(name)
    lv.apply(model, "int8+fp16", fallback="exact")
    cos, sin = paddlemix.inputs(name)["turns"]
    assert sqnr_db(output(model, name, turns=(cos, -sin)), output(model, name)) < 20


def test_hunyuans_padded_text_is_served_by_its_length_and_its_refiner_exactly_with_the_reason():
    model = paddlemix.model("HunyuanVideo")
    lv.apply(model, "int8+fp16", fallback="exact")
    output(model, "HunyuanVideo")
    refiner, *blocks = lv.coverage(model).modules
    (variant, calls, reason), = refiner.runs
    assert (variant, calls) == ("exact (masked)", 1) and "hides other keys than each sample's last" in reason
    assert [module.runs for module in blocks] == [(("int8+fp16 (reference-lowbit)", 1, ""),)] * 2
    lv.remove(model)
    lv.apply(model, "int8+fp16")
    with pytest.raises(lv.UnsupportedError, match=r"'transformer_blocks\.0\.attn': an attention mask of shape \[2, 1, 9, 9\]"):
        output(model, "HunyuanVideo")


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_a_frame_does_not_know_is_refused_by_name(name):
    model = paddlemix.model(name)
    lv.apply(model, "int8+fp16", fallback="exact")
    given = paddlemix.inputs(name)
    for attn in attention_modules(model).values():
        with pytest.raises(lv.UnsupportedError, match="called with ip_hidden_states, which .* it takes hidden_states, enc"):
            attn(given["video"], given["text"], ip_hidden_states=given["text"])


@pytest.mark.parametrize("name", NAMES)
def test_a_processor_with_weights_is_not_replaced(name):
    model = paddlemix.model(name)

    class Adapter(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.to_k_ip = paddle.nn.Linear(4, 4)

    last = list(attention_modules(model))[-1]
    adapter = attention_modules(model)[last].processor = Adapter()
    before = model.attn_processors
    with pytest.raises(lv.UnsupportedError, match=rf"{last} of Model: its processor, Adapter, has weights"):
        lv.apply(model, "int8+fp16")
    assert model.attn_processors == before and not lv.remove(model)
    lv.apply(model, "int8+fp16", modules={last: None})
    assert attention_modules(model)[last].processor is adapter


def test_a_processor_of_the_library_that_does_more_is_not_replaced():
    model = paddlemix.model("HunyuanVideo")
    attn = model.transformer_blocks[0].attn
    attn.set_processor(type("CrossFrameAttnProcessor", (), {"__module__": "ppdiffusers.pipelines.text_to_video_synthesis"})())
    with pytest.raises(lv.UnsupportedError, match=r"blocks\.0\.attn of Model: its processor, CrossFrameAttnProcessor, is "
                                                  "none of .*SlicedAttnProcessor"):
        lv.apply(model, "int8+fp16")
    attn.set_processor(type("SlicedAttnProcessor", (), {"__module__": "ppdiffusers.models.attention_processor"})())
    lv.apply(model, "int8+fp16")


@pytest.mark.parametrize("name, argument", [("Wan", "image_rotary_emb"), ("CogVideoX", "rotary_emb"),
                                            ("HunyuanVideo", "rotary_emb")])
def test_another_models_positions_are_refused_by_name(name, argument):
    model = paddlemix.model(name)
    lv.apply(model, "int8+fp16")
    given = paddlemix.inputs(name)
    for attn in attention_modules(model).values():
        with pytest.raises(lv.UnsupportedError, match=f"called with {argument}, "):
            attn(given["video"], given["text"], **{argument: given["turns"]})


@pytest.mark.parametrize("name", ["CogVideoX", "HunyuanVideo"])
def test_joint_attention_without_text_is_an_error_in_words(name):
    model = paddlemix.model(name)
    lv.apply(model, "int8+fp16")
    attn = model.transformer_blocks[-1].sublayers()[0]
    with pytest.raises(ValueError, match="without encoder_hidden_states; give the text's tokens"):
        attn(paddlemix.inputs(name)["video"])


@pytest.mark.parametrize("which", ["hidden_states", "encoder_hidden_states"])
def test_two_streams_of_images_are_an_error_in_words(which):
    model = paddlemix.model("HunyuanVideo")
    lv.apply(model, "int8+fp16")
    given = paddlemix.inputs("HunyuanVideo")
    streams = {"hidden_states": given["video"], "encoder_hidden_states": given["text"]}
    streams[which] = streams[which].reshape([2, 64, 1, -1])
    with pytest.raises(ValueError, match=rf"takes tokens \[B, N, C\]; {which} is \[2, 64, 1, "):
        model.transformer_blocks[-1].attn(**streams)


def test_the_controlled_cogvideox_has_blocks_of_its_own_with_the_same_protocol():
    attn = paddlemix.model("CogVideoX").transformer_blocks[0].attn1
    block = type("CogVideoXBlock", (), {"__module__": "ppdiffusers.models.cogvideox_transformer_3d_vctrl"})()
    assert frames.frame_of(attn, block) is frames.FRAMES["cogvideox"]


@pytest.mark.parametrize("which", ["attn1", "attn2"])
def test_a_mask_of_wans_keys_is_served(which):
    model = paddlemix.model("Wan")
    attn = getattr(model.transformer_blocks[0], which)
    video = paddlemix.inputs("Wan")["video"]
    text = None if which == "attn1" else paddlemix.inputs("Wan")["text"]
    keys = (video if text is None else text).shape[1]
    mask = paddle.arange(keys) < paddle.to_tensor([[keys], [keys // 2]])
    own = attn(video, text, attention_mask=mask[:, None, None])
    assert sqnr_db(attn(video, text), own) < FLOOR_DB
    lv.apply(model, "int8+fp16")
    with paddle.no_grad():
        assert sqnr_db(attn(video, text, attention_mask=mask), own) > FLOOR_DB


def test_a_frame_that_takes_any_argument_looks_for_itself(monkeypatch):
    got = {}
    monkeypatch.setitem(frames.FRAMES, "any", lambda processor, attn, hidden_states, encoder_hidden_states, attention_mask,
                        image_rotary_emb=None, **others: got.update(others) or hidden_states)
    monkeypatch.setitem(frames._declared, "ppdiffusers.models.transformer_wan.WanTransformerBlock", "any")
    model = paddlemix.model("Wan")
    model.set_attn_processor(lv.ExactAttnProcessor())
    model.transformer_blocks[0].attn1(paddlemix.inputs("Wan")["video"], ip_hidden_states=1, temb=None)
    assert got == {"ip_hidden_states": 1}


def test_what_frames_take_stands_in_a_processors_signature_by_name():
    """Attention classes like diffusers' pass on only that."""
    named = inspect.signature(lv.ExactAttnProcessor().__call__).parameters
    for frame in frames.FRAMES.values():
        assert set(inspect.signature(frame).parameters) <= {"processor", *named}
