"""Which attention classes are hooked: those that a frame is declared for, and no others."""
import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from paddle import nn  # noqa: E402

import lowbit_video as lv  # noqa: E402
from lowbit_video.hook import frames  # noqa: E402
from lowbit_video.hook.frames.owners import owner_of  # noqa: E402
from lowbit_video.hook.frames.rotary import rotated  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402
from lowbit_video.runtime import paddle_runtime  # noqa: E402

import toy_model  # noqa: E402


@pytest.fixture(autouse=True)
def own_declarations(monkeypatch):
    monkeypatch.setattr(frames, "_declared", dict(frames._declared))


def foreign(base=nn.Layer):
    """A new class each time, alike to the toy's attention but for its name."""

    class Foreign(base):
        def __init__(self, like):
            super().__init__()
            self.heads, self.norm_q, self.norm_k = like.heads, like.norm_q, like.norm_k
            self.to_q, self.to_k, self.to_v, self.to_out = like.to_q, like.to_k, like.to_v, like.to_out
            self.set_processor(lv.ExactAttnProcessor())

        set_processor, forward = toy_model.Attention.set_processor, toy_model.Attention.forward

    return Foreign


class Block(nn.Layer):
    """What owns an attention module."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn


def model_of(make):
    """The toy model with other attention modules of the same weights."""
    model = toy_model.model()
    model.blocks = nn.LayerList([make(block) for block in model.blocks])
    return model


def outputs(model):
    given = toy_model.inputs()
    with paddle.no_grad():
        return [part.numpy() for part in model(given["video"], given["text"], None, given["rotary"])]


def test_an_undeclared_class_is_refused_by_name_and_nothing_is_changed():
    cls = foreign()
    model = model_of(cls)
    before = [block.processor for block in model.blocks]
    with pytest.raises(lv.UnsupportedError, match="blocks.0 of Model: the attention class .*Foreign in .*LayerList") as refusal:
        lv.apply(model, "int8+fp16")
    for declared in ("lowbit_video.pipelines.cogvideox.transformer.Attention", "cogvideox_transformer_3d.CogVideoXBlock",
                     "toy_model.Attention", "lowbit_video.declare_attention("):
        assert declared in str(refusal.value)
    assert [block.processor for block in model.blocks] == before and not lv.remove(model)


@pytest.mark.parametrize("processor", [lv.ExactAttnProcessor(), lv.LowBitAttnProcessor("int8+fp16", fallback="exact")], ids=str)
def test_a_processor_set_by_hand_refuses_it_at_its_first_call(processor):
    model = model_of(foreign())
    model.blocks[1].set_processor(processor)
    model.blocks[0].set_processor(lambda attn, video, text, *rest: (video, text))
    with pytest.raises(lv.UnsupportedError, match="Foreign in .*LayerList is not declared"):
        outputs(model)
    assert processor.records.peek(model.blocks[1]) is None


def test_a_modules_own_kind_of_processor_needs_no_declaration():
    model = model_of(foreign())
    lv.apply(model, lambda attn, video, text, *rest: (video * 0, text * 0))
    np.testing.assert_array_equal(outputs(model)[0], toy_model.inputs()["video"].numpy())


def test_declared_in_one_line_it_runs_as_the_toy_does():
    cls = lv.declare_attention(foreign())
    model, toy = model_of(cls), toy_model.model()
    for one in (model, toy):
        lv.apply(one, "int4+fp16")
    for got, wanted in zip(outputs(model), outputs(toy)):
        np.testing.assert_array_equal(got, wanted)
    assert [m.calls for m in lv.coverage(model).modules] == [1, 1]
    assert lv.remove(model)


def test_a_subclass_is_declared_with_its_base():
    base = foreign()
    lv.declare_attention(base)
    sub = type("Sub", (base,), {})
    lv.apply(model_of(sub), "int8+fp16")


@pytest.mark.parametrize("hook", ["apply", "by hand"])
def test_the_owning_block_may_be_declared_instead(hook):
    """As for diffusers, where many blocks share one attention class."""
    attention, block = foreign(), type("DeclaredBlock", (Block,), {})
    lv.declare_attention(block)
    model, other = block(attention(toy_model.model().blocks[0])), Block(attention(toy_model.model().blocks[0]))
    given = toy_model.inputs()
    for one in (model, other):
        if hook == "by hand":
            one.attn.set_processor(lv.LowBitAttnProcessor("int8+fp16"))
    if hook == "apply":
        lv.apply(model, "int8+fp16")
        with pytest.raises(lv.UnsupportedError, match="Foreign in .*Block is not declared"):
            lv.apply(other, "int8+fp16")
    with paddle.no_grad():
        assert model.attn(given["video"], given["text"])[0].shape == given["video"].shape
    if hook == "by hand":
        with pytest.raises(lv.UnsupportedError, match="Foreign in .*Block is not declared"):
            other.attn(given["video"], given["text"])


def test_owners_are_found_and_a_module_without_one_has_none():
    model = toy_model.model()
    assert owner_of(model.blocks[1]) is model.blocks and owner_of(model.blocks) is model and owner_of(model) is None
    late = Block(toy_model.Attention())  # made after the look at all objects
    assert owner_of(late.attn) is late


def test_what_cannot_be_declared_is_said():
    with pytest.raises(TypeError, match="takes a class"):
        lv.declare_attention(toy_model.Attention())
    with pytest.raises(ValueError, match="unknown frame 'no such'; there are: cogvideox, one_stream, own, two_streams, wan"):
        lv.declare_attention(toy_model.Attention, frame="no such")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rotary_positions_keep_the_dtype(dtype):
    given = toy_model.inputs(video_tokens=6)
    x = paddle.randn([1, 6, 2, 32]).astype(dtype)
    out = rotated(paddle_runtime, x, given["rotary"])
    pairs = x.astype("float32").numpy().reshape(1, 6, 2, 16, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (given["rotary"][0] + 1j * given["rotary"][1]).numpy()[None, :, None, ::2]
    wanted = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out.astype("float32").numpy(), wanted, atol={"float32": 1e-5, "float16": 4e-3}.get(dtype, 0.03))


# name of the model in diffusers: (arguments of a tiny one, the class that is named)
FOREIGN_MODELS = {
    "SanaTransformer2DModel": (dict(patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
                                    num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=4,
                                    cross_attention_dim=8, caption_channels=8, sample_size=32), "SanaTransformerBlock"),
    "WanTransformer3DModel": (dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
                                   out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1), "WanAttention"),
    "HunyuanVideoTransformer3DModel": (dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
                                            num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1,
                                            patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
                                            rope_axes_dim=(2, 4, 4)), "HunyuanVideo"),
    "LTXVideoTransformer3DModel": (dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
                                        cross_attention_dim=16, num_layers=1, caption_channels=16), "LTXAttention"),
    "FluxTransformer2DModel": (dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                    num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                                    axes_dims_rope=[4, 4, 8]), "FluxAttention"),
    "UNet2DModel": (dict(block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
                         norm_num_groups=2, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                         up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=2), "in .*Module"),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", FOREIGN_MODELS)
def test_diffusers_models_of_another_protocol_are_refused_by_name(name):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    arguments, named = FOREIGN_MODELS[name]
    model = getattr(diffusers, name)(**arguments)
    before = {name: module.processor for name, module in attention_modules(model).items()}
    with pytest.raises(lv.UnsupportedError, match=f"of {name}: the attention class .*{named}") as refusal:
        lv.apply(model, "int8+fp16", fallback="exact")
    dispatches = any(hasattr(processor, "_attention_backend") for processor in before.values())
    assert ("dispatcher for its attention: take a backend of that" in str(refusal.value)) == dispatches
    assert before and {name: module.processor for name, module in attention_modules(model).items()} == before
