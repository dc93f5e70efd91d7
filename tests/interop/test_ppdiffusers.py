"""Models of the real ppdiffusers package: hooked at low bit, reported in full, and given back to the bit."""
import numpy as np
import pytest

pytestmark = pytest.mark.interop
paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
pytest.importorskip("ppdiffusers", reason="ppdiffusers is not installed (make interop)")
import ppdiffusers  # noqa: E402
from ppdiffusers.models.attention_processor import (  # noqa: E402
    Attention,
    AttnProcessor,
    IPAdapterAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from ppdiffusers.pipelines.text_to_video_synthesis.pipeline_text_to_video_zero import (  # noqa: E402
    CrossFrameAttnProcessor,
)

import lowbit_video as lv  # noqa: E402
from lowbit_video.hook import frames  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

from helpers import sqnr_db  # noqa: E402
from ppdiffusers_models import MODELS, TEXT, TEXT_TOKENS, dit_pipeline, made, output, text  # noqa: E402

FLOOR_DB = 30
WITH_SETTER = ["UNet2DConditionModel", "SD3Transformer2DModel"]


@pytest.fixture(autouse=True)
def no_gradients():
    with paddle.no_grad():
        yield


@pytest.fixture(autouse=True)
def own_declarations(monkeypatch):
    monkeypatch.setattr(frames, "_declared", dict(frames._declared))


@pytest.fixture(autouse=True)
def sd3s_operator(monkeypatch):
    """SD3's own processor calls a function that Paddle 3.3.1 does not have; this is what it stands for."""
    monkeypatch.setattr(paddle.nn.functional, "scaled_dot_product_attention_", raising=False,
                        value=paddle.nn.functional.scaled_dot_product_attention)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_hooked_reported_and_given_back_to_the_bit(name):
    model = made(name)
    own = output(model, name)
    before = {module: attn.processor for module, attn in attention_modules(model).items()}
    lv.apply(model, lv.ExactAttnProcessor())
    np.testing.assert_allclose(output(model, name), own, atol=1e-4)
    lv.remove(model)
    lv.apply(model, "int8+fp16")
    low = output(model, name)
    assert FLOOR_DB < sqnr_db(low, own) < 100
    modules = lv.coverage(model).modules
    assert [module.name for module in modules] == list(before) and len(before) >= 2
    assert {run for module in modules for run, _, _ in module.runs} == {"int8+fp16 (reference-lowbit)"}
    assert all(module.calls for module in modules)
    assert lv.remove(model)
    assert {module: attn.processor for module, attn in attention_modules(model).items()} == before
    np.testing.assert_array_equal(output(model, name), own)


@pytest.mark.parametrize("name", WITH_SETTER)
def test_the_models_own_setter_takes_one_processor_and_a_dict_that_it_empties(name):
    model = made(name)
    own, before = output(model, name), model.attn_processors
    with lv.apply(model, "int8+fp16"):
        low = output(model, name)
    model.set_attn_processor(lv.LowBitAttnProcessor("int8+fp16"))
    np.testing.assert_array_equal(output(model, name), low)
    given = dict.fromkeys(before, lv.LowBitAttnProcessor("int8+fp16"))
    model.set_attn_processor(given)
    assert not given
    np.testing.assert_array_equal(output(model, name), low)
    handle = lv.apply(model, "int4+fp16")
    model.set_attn_processor(dict.fromkeys(before, lv.ExactAttnProcessor()))
    handle.remove()
    np.testing.assert_array_equal(output(model, name), low)
    model.set_attn_processor(before)
    np.testing.assert_array_equal(output(model, name), own)


def test_a_dit_pipeline_runs_end_to_end():
    pipe = dit_pipeline()

    def images():
        paddle.seed(3)
        return pipe(class_labels=[1, 2], num_inference_steps=2, output_type="np").images

    own = images()
    lv.apply(pipe, "int8+fp16")
    low = images()
    report = lv.coverage(pipe)
    assert own.shape == (2, 32, 32, 3) and 25 < sqnr_db(low, own) < 100
    assert {module.full_name: module.calls for module in report.modules} == {
        "transformer.transformer_blocks.0.attn1": 2, "transformer.transformer_blocks.1.attn1": 2}
    assert report.summary() == "2 of 2 attention modules ran at low bit in every call"
    assert lv.remove(pipe)
    np.testing.assert_array_equal(images(), own)


def mask(*lengths, keys=TEXT_TOKENS):
    return (paddle.arange(keys) < paddle.to_tensor(lengths)[:, None]).astype("float32")


@pytest.mark.parametrize("argument, keys", [("encoder_attention_mask", TEXT_TOKENS), ("attention_mask", 36)])
def test_masks_of_padding_are_served_by_lengths_and_others_exactly_with_the_reason(argument, keys):
    name, which = "Transformer2DModel", "attn2" if "encoder" in argument else "attn1"
    model, padded = made(name), mask(keys, 4, keys=keys)
    own = output(model, name, **{argument: padded})
    assert sqnr_db(output(model, name), own) < FLOOR_DB
    lv.apply(model, "int8+fp16")
    assert sqnr_db(output(model, name, **{argument: padded}), own) > FLOOR_DB
    assert lv.coverage(model).variants() == {"int8+fp16 (reference-lowbit)": 4}
    holed = padded.clone()
    holed[0, 1] = 0
    with pytest.raises(lv.UnsupportedError, match=rf"blocks\.0\.{which}': an attention mask of shape \[2, 1, {keys}\]"):
        output(model, name, **{argument: holed})
    lv.remove(model)
    own = output(model, name, **{argument: holed})
    lv.apply(model, "int8+fp16", fallback="exact")
    assert sqnr_db(output(model, name, **{argument: holed}), own) > FLOOR_DB
    fell = {module.name: module.runs[0][2] for module in lv.coverage(model).fallbacks}
    assert list(fell) == [f"transformer_blocks.{block}.{which}" for block in (0, 1)]
    assert all("hides other keys than each sample's last" in reason for reason in fell.values())


ATTENTIONS = {
    "self": dict(),
    "cross": dict(cross_attention_dim=TEXT),
    "with a bias": dict(bias=True),
    "an image": dict(residual_connection=True, norm_num_groups=4, rescale_output_factor=2.0),
    "cross, layer norm": dict(cross_attention_dim=TEXT, cross_attention_norm="layer_norm"),
    "cross, group norm": dict(cross_attention_dim=TEXT, cross_attention_norm="group_norm", cross_attention_norm_num_groups=4),
    "unscaled": dict(scale_qk=False),
    "spatial norm": dict(spatial_norm_dim=4),
}


def attention_of(**options):
    class Block(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.attn = Attention(query_dim=64, heads=2, dim_head=32, **options)

    lv.declare_attention(Block, frame="one_stream")
    paddle.seed(0)
    block = Block()
    block.eval()
    return block, block.attn


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("masked", ["", "keys", "queries", "heads"])
def test_what_an_attention_module_may_be_built_with_is_served(name, masked):
    block, attn = attention_of(**ATTENTIONS[name])
    tokens = paddle.randn([2, 64, 5, 6]) if name in ("an image", "spatial norm") else paddle.randn([2, 30, 64])
    given = dict(encoder_hidden_states=text()) if "cross" in name else {}
    if name == "spatial norm":
        given["temb"] = paddle.randn([2, 4, 5, 6])
    keys = TEXT_TOKENS if "cross" in name else 30
    if masked:
        shape = {"keys": [2, 1, keys], "queries": [2 * 2, 30, keys], "heads": [2 * 2, 1, keys]}[masked]
        given["attention_mask"] = paddle.randn(shape)
    own = attn(tokens, **given).numpy()
    with lv.apply(block, lv.ExactAttnProcessor()):
        np.testing.assert_allclose(attn(tokens, **given).numpy(), own, atol=1e-4)
    with lv.apply(block, "int8+fp16", fallback="exact"):
        assert sqnr_db(attn(tokens, **given).numpy(), own) > FLOOR_DB
        assert list(lv.coverage(block).variants()) == ["exact (masked)" if masked else "int8+fp16 (reference-lowbit)"]
    np.testing.assert_array_equal(attn(tokens, **given).numpy(), own)


def test_a_lora_is_weighed_as_ever():
    """Its scale comes by cross_attention_kwargs."""
    from ppdiffusers.models.lora import LoRALinearLayer

    block, attn = attention_of(bias=True)
    for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
        lora = LoRALinearLayer(64, 64, rank=4)
        lora.up.weight.set_value(paddle.randn(lora.up.weight.shape) * 0.3)
        layer.set_lora_layer(lora)
    tokens = paddle.randn([2, 30, 64])
    own = {scale: attn(tokens, scale=scale).numpy() for scale in (0.0, 0.5)}
    assert sqnr_db(own[0.0], own[0.5]) < FLOOR_DB
    lv.apply(block, "int8+fp16")
    for scale, wanted in own.items():
        assert sqnr_db(attn(tokens, scale=scale).numpy(), wanted) > FLOOR_DB


def test_an_argument_that_ppdiffusers_would_ignore_is_refused_by_name():
    name = "UNet2DConditionModel"
    model = made(name)
    lv.apply(model, "int8+fp16")
    with pytest.raises(lv.UnsupportedError, match="called with guess, which one_stream_attention does not know; it .*temb"):
        output(model, name, cross_attention_kwargs={"guess": 1})


@pytest.mark.parametrize("processor", [SlicedAttnProcessor(1), XFormersAttnProcessor(), AttnProcessor()],
                         ids=lambda processor: type(processor).__name__)
def test_processors_that_compute_the_same_are_replaced(processor):
    block, attn = attention_of()
    attn.set_processor(processor)
    with lv.apply(block, "int8+fp16"):
        assert isinstance(attn.processor, lv.LowBitAttnProcessor)
    assert attn.processor is processor


@pytest.mark.parametrize("make, what", [
    pytest.param(lambda: CrossFrameAttnProcessor(batch_size=2), "is none of those that", id="text to video, zero-shot"),
    pytest.param(lambda: IPAdapterAttnProcessor(64, TEXT), "has weights", id="IP adapter"),
])
def test_processors_that_do_more_are_not_replaced(make, what):
    model = made("UNet2DConditionModel")
    last = list(attention_modules(model))[-1]
    attention_modules(model)[last].set_processor(make())
    before = model.attn_processors
    with pytest.raises(lv.UnsupportedError, match=rf"{last} of UNet2DConditionModel: its processor, \w+, {what}"):
        lv.apply(model, "int8+fp16")
    assert model.attn_processors == before


def test_attention_of_another_protocol_is_refused_by_name():
    model = ppdiffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=TEXT, attention_head_dim=32)
    before = model.attn_processors
    with pytest.raises(lv.UnsupportedError, match=r"UNet2DConditionModel: the attention class ppdiffusers\..*Attention in .* "
                                                  "is not declared"):
        lv.apply(model, "int8+fp16")
    assert model.attn_processors == before


def test_a_model_that_was_saved_comes_back_without_hooks_and_the_report_says_so(tmp_path):
    name = "Transformer2DModel"
    model = made(name)
    own = output(model, name)
    lv.apply(model, "int8+fp16")
    model.save_pretrained(str(tmp_path))
    again = ppdiffusers.Transformer2DModel.from_pretrained(str(tmp_path))
    again.eval()
    np.testing.assert_array_equal(output(again, name), own)
    assert "4 exact" in lv.coverage(again).summary() and "not hooked" in str(lv.coverage(again))


def test_what_sets_processors_anew_takes_hooks_away_and_the_report_says_so():
    model = made("UNet2DConditionModel")
    lv.apply(model, "int8+fp16")
    model.set_attention_slice(1)
    output(model, "UNet2DConditionModel")
    report = lv.coverage(model)
    assert not any(module.hooked for module in report.modules)
    assert all(module.processor == "SlicedAttnProcessor" and "not hooked" in module.reason for module in report.modules)


def test_hooked_stable_diffusion_3_needs_no_function_that_paddle_lacks(monkeypatch):
    name = "SD3Transformer2DModel"
    model = made(name)
    wanted = output(model, name)
    monkeypatch.delattr(paddle.nn.functional, "scaled_dot_product_attention_")
    with pytest.raises(AttributeError, match="scaled_dot_product_attention_"):
        output(model, name)
    lv.apply(model, "int8+fp16")
    assert sqnr_db(output(model, name), wanted) > FLOOR_DB


@pytest.mark.parametrize("kind", ["gated", "temporal"])
def test_blocks_with_attention_of_their_own_are_hooked(kind):
    from ppdiffusers.models.attention import GatedSelfAttentionDense, TemporalBasicTransformerBlock

    paddle.seed(0)
    if kind == "gated":
        block = GatedSelfAttentionDense(query_dim=64, context_dim=TEXT, n_heads=2, d_head=32)
        block.alpha_attn.set_value(paddle.to_tensor(1.0))
        given = (paddle.randn([2, 20, 64]), text())
    else:
        block = TemporalBasicTransformerBlock(dim=64, time_mix_inner_dim=64, num_attention_heads=2, attention_head_dim=32,
                                              cross_attention_dim=TEXT)
        given = dict(hidden_states=paddle.randn([6, 10, 64]), num_frames=3, encoder_hidden_states=text(20))
    block.eval()
    run = lambda: (block(*given) if kind == "gated" else block(**given)).numpy()
    own = run()
    lv.apply(block, "int8+fp16")
    assert FLOOR_DB < sqnr_db(run(), own) < 100
    assert all(module.calls == 1 for module in lv.coverage(block).modules)
    lv.remove(block)
    np.testing.assert_array_equal(run(), own)
