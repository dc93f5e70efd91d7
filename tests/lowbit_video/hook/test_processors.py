"""The hook: what a processor computes, how `apply` sets it and `remove` takes it back."""
import copy
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import ExactAttnProcessor, LowBitAttnProcessor, apply, coverage, declare_attention, remove  # noqa: E402
from lowbit_video.engine.options import AttentionOptions  # noqa: E402
from lowbit_video.errors import NonFiniteError, UnsupportedError  # noqa: E402
from lowbit_video.hook import processors  # noqa: E402

import toy_model  # noqa: E402
from helpers import naive_attention, qkv, sqnr_db  # noqa: E402


def outputs(model, **given):
    with paddle.no_grad():
        return [part.numpy() for part in model(**(given or toy_model.inputs()))]


def by_hand(attn, video, text, mask=None, rotary=None):
    """Joint attention of one module in NumPy float64, written apart from the code under test."""
    def linear(layer, x):
        return x @ layer.weight.numpy().astype(np.float64) + layer.bias.numpy()

    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer._epsilon)
        return x * layer.weight.numpy() + layer.bias.numpy()

    def turn(x):
        if rotary is None:
            return x
        x = x.copy()
        cos, sin = rotary[0].numpy()[:, None, ::2], rotary[1].numpy()[:, None, ::2]
        even, odd = x[:, text_tokens:, :, ::2].copy(), x[:, text_tokens:, :, 1::2].copy()
        x[:, text_tokens:, :, ::2] = even * cos - odd * sin
        x[:, text_tokens:, :, 1::2] = odd * cos + even * sin
        return x

    text_tokens = text.shape[1]
    joint = np.concatenate([text.numpy(), video.numpy()], 1).astype(np.float64)
    batch, tokens, width = joint.shape
    q, k, v = (linear(layer, joint).reshape(batch, tokens, attn.heads, -1) for layer in (attn.to_q, attn.to_k, attn.to_v))
    q, k = turn(norm(attn.norm_q, q)), turn(norm(attn.norm_k, k))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = linear(attn.to_out[0], np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, tokens, width))
    return out[:, text_tokens:], out[:, :text_tokens]


@pytest.mark.parametrize("rotary", [False, True], ids=["no-rotary", "rotary"])
def test_exact_processor_computes_joint_attention(rotary):
    attn = toy_model.model().blocks[0]
    given = toy_model.inputs()
    rotary = given["rotary"] if rotary else None
    video, text = attn(given["video"], given["text"], image_rotary_emb=rotary)
    expected = by_hand(attn, given["video"], given["text"], rotary=rotary)
    np.testing.assert_allclose(video.numpy(), expected[0], atol=2e-5)
    np.testing.assert_allclose(text.numpy(), expected[1], atol=2e-5)


def test_exact_processor_honours_masks_of_every_shape():
    attn, given = toy_model.model().blocks[0], toy_model.inputs(batch=2)
    tokens = 47
    rng = np.random.default_rng(0)
    keys = np.where(rng.random((2, tokens)) < 0.3, -1e4, 0.0).astype(np.float32)
    full = np.where(rng.random((2, tokens, tokens)) < 0.3, -1e4, 0.0).astype(np.float32)
    for mask, wide in ((keys, keys[:, None, None]), (full, full[:, None]), (full[:, None], full[:, None])):
        expected = by_hand(attn, given["video"], given["text"], mask=wide)
        got = attn(given["video"], given["text"], attention_mask=paddle.to_tensor(mask))
        np.testing.assert_allclose(got[0].numpy(), expected[0], atol=2e-5)
    allowed = attn(given["video"], given["text"], attention_mask=paddle.to_tensor(keys[:, None, None] == 0))
    np.testing.assert_allclose(allowed[0].numpy(), by_hand(attn, given["video"], given["text"], mask=keys[:, None, None])[0],
                               atol=2e-5)
    with pytest.raises(ValueError, match=r"shape \[2, 46\].*must be \[2, 47\]"):
        attn(given["video"], given["text"], attention_mask=paddle.to_tensor(keys[:, :-1]))
    with pytest.raises(ValueError, match=r"shape \[2, 1, 3, 47\].*must be"):
        attn(given["video"], given["text"], attention_mask=paddle.to_tensor(full[:, None, :3]))


@pytest.mark.parametrize("precision, floor_db", [("int8+fp16", 40), ("int8/int4+fp8", 25)])
def test_low_bit_is_near_exact_and_not_exact(precision, floor_db):
    model = toy_model.model()
    exact = outputs(model)
    apply(model, precision)
    low = outputs(model)
    assert not np.array_equal(low[0], exact[0])
    assert sqnr_db(low[0], exact[0]) > floor_db and sqnr_db(low[1], exact[1]) > floor_db


def test_inputs_are_not_changed():
    model, given = toy_model.model(), toy_model.inputs()
    before = [given["video"].numpy().copy(), given["text"].numpy().copy(), given["rotary"][0].numpy().copy()]
    apply(model, "int4+fp16")
    outputs(model, **given)
    for tensor, array in zip((given["video"], given["text"], given["rotary"][0]), before):
        assert np.array_equal(tensor.numpy(), array)


def test_remove_restores_the_very_processors_and_bit_identical_output():
    model = toy_model.model()
    custom = ExactAttnProcessor()
    model.blocks[1].set_processor(custom)
    before = [block.processor for block in model.blocks]
    exact = outputs(model)
    apply(model, "int8+fp16")
    assert all(isinstance(block.processor, LowBitAttnProcessor) for block in model.blocks)
    assert not np.array_equal(outputs(model)[0], exact[0])
    assert remove(model)
    assert [block.processor for block in model.blocks] == before
    assert all(np.array_equal(a, b) for a, b in zip(outputs(model), exact))
    assert not remove(model)


def test_nested_applies_come_off_one_at_a_time():
    model = toy_model.model()
    first = [block.processor for block in model.blocks]
    apply(model, "int8+fp16")
    second = [block.processor for block in model.blocks]
    apply(model, None, {"blocks.1": "int4+fp8"})
    assert model.blocks[0].processor is second[0] and model.blocks[1].processor is not second[1]
    remove(model)
    assert [block.processor for block in model.blocks] == second
    remove(model)
    assert [block.processor for block in model.blocks] == first


def test_a_handle_takes_back_its_apply_and_those_above_it():
    model = toy_model.model()
    first = [block.processor for block in model.blocks]
    with apply(model, "int8+fp16") as handle:
        apply(model, "int4+fp16")
    assert [block.processor for block in model.blocks] == first
    handle.remove()
    assert not remove(model)


def test_patterns_choose_per_module_and_the_last_one_wins():
    model = toy_model.model()
    given = ExactAttnProcessor()
    apply(model, "int8+fp16", {"blocks.*": "int8+fp8", "*.1": "int4+fp16"})
    assert [str(block.processor.precision) for block in model.blocks] == ["int8+fp8", "int4+fp16"]
    remove(model)
    before = model.blocks[0].processor
    apply(model, "int8+fp16", {"blocks.0": None, "blocks.1": given})
    assert model.blocks[0].processor is before and model.blocks[1].processor is given


def test_a_pattern_without_a_module_is_an_error_and_changes_nothing():
    model = toy_model.model()
    before = [block.processor for block in model.blocks]
    with pytest.raises(ValueError, match=r"'block\.\*' names no attention module; there are: blocks\.0, blocks\.1"):
        apply(model, "int8+fp16", {"blocks.0": "fp16", "block.*": "int4+fp16"})
    with pytest.raises(ValueError, match="unknown precision 'int9'"):
        apply(model, "int8+fp16", {"blocks.0": "int9"})
    assert [block.processor for block in model.blocks] == before
    with pytest.raises(ValueError, match="no attention module"):
        apply(paddle.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="neither a pipeline"):
        apply("CogVideoX-2b")


def test_apply_touches_only_the_transformer_of_a_pipeline():
    pipe = toy_model.Pipe()
    x = paddle.randn([1, 5, 8])
    image = paddle.randn([1, 3, 4, 4])
    before = pipe.text_encoder(x).numpy(), pipe.vae(image).numpy()
    apply(pipe, "int2+fp16")
    assert all(isinstance(block.processor, LowBitAttnProcessor) for block in pipe.transformer.blocks)
    assert np.array_equal(pipe.text_encoder(x).numpy(), before[0]) and np.array_equal(pipe.vae(image).numpy(), before[1])
    assert remove(pipe.transformer)


def test_a_mask_is_an_error_or_the_exact_fallback():
    model, given = toy_model.model(), toy_model.inputs()
    mask = paddle.zeros([2, 47])
    mask[:, :9] = -1e4
    exact = outputs(model, **given, mask=mask)
    apply(model, "int8+fp16")
    with pytest.raises(UnsupportedError, match=r"module 'blocks\.0': an attention mask of shape \[2, 47\].*fallback='exact'"):
        outputs(model, **given, mask=mask)
    remove(model)
    apply(model, "int8+fp16", fallback="exact")
    assert all(np.array_equal(a, b) for a, b in zip(outputs(model, **given, mask=mask), exact))
    assert "no low-bit kernel takes a mask" in str(coverage(model))


def test_a_head_dim_out_of_range_is_an_error_or_the_exact_fallback():
    model = toy_model.model(heads=4, head_dim=16)
    given = toy_model.inputs(rotary_dim=16)
    exact = outputs(model, **given)
    apply(model, "int8+fp16")
    with pytest.raises(UnsupportedError, match=r"module 'blocks\.0'(.|\n)*head_dim 16 is not a multiple of 8 from 32"):
        outputs(model, **given)
    remove(model)
    apply(model, "int8+fp16", fallback="exact")
    assert all(np.array_equal(a, b) for a, b in zip(outputs(model, **given), exact))
    run = coverage(model).modules[0].runs[0]
    assert run[0] == "exact" and run[2].startswith("head_dim 16 is not a multiple of 8")


def test_a_dtype_is_an_error_or_the_exact_fallback():
    tensor = paddle.randn([1, 5, 2, 32], dtype="float64")
    with pytest.raises(UnsupportedError, match="dtype float64; low-bit attention takes float16, bfloat16, float32"):
        LowBitAttnProcessor().attend(tensor, tensor, tensor)


@pytest.mark.parametrize("fallback", [None, "exact"])
def test_every_choice_of_a_call_reaches_the_engine(fallback, monkeypatch):
    """At values that are not their defaults; exact attention is taken where it is faster only with the fallback."""
    seen = []
    ran = "out", "lse", SimpleNamespace(name="kernel")
    monkeypatch.setattr(processors, "run", lambda q, k, v, options, packing: seen.append((options, packing)) or ran)
    q = paddle.zeros([1, 5, 2, 32])
    processor = LowBitAttnProcessor("int4+fp8", fallback=fallback, backend="reference", check_finite=False)
    assert processor.attend(q, q, q, is_causal=True, scale=0.3, return_lse=True) == ("out", "lse")
    assert processor.attend(q, q, q) == "out"
    common = dict(precision="int4+fp8", tensor_layout="NHD", backend="reference", check_finite=False,
                  only_if_faster=fallback == "exact")
    assert seen == [(AttentionOptions(is_causal=True, scale=0.3, return_lse=True, **common), None),
                    (AttentionOptions(**common), None)]


@pytest.mark.parametrize("processor", [ExactAttnProcessor(), LowBitAttnProcessor("int8+fp16", fallback="exact")], ids=str)
def test_exact_attention_heeds_mask_scale_and_lse(processor, monkeypatch):
    """As a processor's own, and where no kernel serves a call."""
    def refuse(*given):
        raise UnsupportedError("no kernel")

    monkeypatch.setattr(processors, "run", refuse)
    arrays = qkv(q_len=9, kv_len=12, dim=32)
    q, k, v = map(paddle.to_tensor, arrays)
    wanted, wanted_lse = naive_attention(*arrays, scale=0.4, causal=True)
    out, lse = processor.attend(q, k, v, is_causal=True, scale=0.4, return_lse=True)
    np.testing.assert_allclose(out.numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(lse.numpy(), wanted_lse, atol=1e-5)
    np.testing.assert_allclose(processor.attend(q, k, v, is_causal=True, scale=0.4).numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(processor.attend(q, k, v).numpy(), naive_attention(*arrays)[0], atol=1e-5)
    for causal in (False, True):  # by the framework's own, where there are as many queries as keys
        same = naive_attention(*arrays[:1] * 3, scale=0.4, causal=causal)[0]
        np.testing.assert_allclose(processor.attend(q, q, q, is_causal=causal, scale=0.4).numpy(), same, atol=1e-5)


def test_a_module_hooked_by_hand_is_named_as_paddle_names_it():
    attn, given = toy_model.model(heads=4, head_dim=16).blocks[0], toy_model.inputs()
    attn.set_processor(LowBitAttnProcessor("int8+fp16"))
    with pytest.raises(UnsupportedError, match=f"attention module '{attn.full_name()}': no kernel"):
        attn(given["video"], given["text"])


def test_non_finite_input_names_module_and_tensor():
    model, given = toy_model.model(), toy_model.inputs()
    apply(model, "int8+fp16")
    given["video"][0, 3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"module 'blocks\.0': q has \d+ NaN"):
        outputs(model, **given)
    remove(model)
    apply(model, "int8+fp16", check_finite=False)
    outputs(model, **given)


def test_an_unknown_fallback_or_backend_is_named():
    with pytest.raises(ValueError, match="unknown fallback 'fast'"):
        LowBitAttnProcessor(fallback="fast")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        apply(toy_model.model(), "int8+fp16", backend="cuda")


def test_attend_is_replaceable_and_has_one_type():
    model = toy_model.model()
    processor = LowBitAttnProcessor("int8+fp16")
    inner, seen = processor.attend, []

    def wrapper(q, k, v, is_causal=False, scale=None, return_lse=False):
        out, lse = inner(q, k, v, is_causal=is_causal, scale=scale, return_lse=True)
        seen.append((tuple(out.shape), tuple(lse.shape)))
        return (out, lse) if return_lse else out

    processor.attend = wrapper
    apply(model, processor)
    outputs(model)
    assert seen == [((2, 47, 2, 32), (2, 2, 47))] * 2
    told = "int8+fp16 (reference-lowbit; prologue apart: this attend takes no norms and positions)"
    assert coverage(model).variants() == {told: 2}
    q = paddle.randn([1, 9, 2, 32])
    exact, exact_lse = ExactAttnProcessor().attend(q, q, q, return_lse=True)
    low, low_lse = inner(q, q, q, return_lse=True)
    assert float((exact - low).abs().max()) < 0.05 and float((exact_lse - low_lse).abs().max()) < 0.05


def test_a_copied_model_has_its_own_counts():
    model = toy_model.model()
    apply(model, "int8+fp16")
    outputs(model)
    twin = copy.deepcopy(model)
    outputs(twin)
    assert coverage(model).modules[0].calls == 1
    assert twin.blocks[0].attention_slot.key != model.blocks[0].attention_slot.key


def test_processors_keep_no_model_alive():
    processor = LowBitAttnProcessor("int8+fp16")
    model = toy_model.model()
    apply(model, processor)
    outputs(model)
    gone = weakref.ref(model.blocks[0])
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("masked", [False, True])
def test_an_eager_call_does_not_pass_through_the_graphs_operator(masked):
    model = toy_model.model()
    apply(model, "int8+fp16", fallback="exact")
    for block in model.blocks:
        block.attention_slot.operators = None
    given = toy_model.inputs()
    mask = paddle.zeros([2, 47]) if masked else None
    with paddle.no_grad():
        model(given["video"], given["text"], mask, given["rotary"])
    assert [module.calls for module in coverage(model).modules] == [1, 1]


@pytest.mark.torch
@pytest.mark.parametrize("rotary", [False, True], ids=["2b", "5b"])
def test_a_diffusers_transformer_takes_the_same_processors(rotary):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6,
        use_rotary_positional_embeddings=rotary).eval()
    angle = torch.randn(3 * 4 * 4, 32).repeat_interleave(2, 1)
    given = dict(hidden_states=torch.randn(2, 3, 4, 8, 8), encoder_hidden_states=torch.randn(2, 6, 16),
                 timestep=torch.tensor([7, 7]), image_rotary_emb=(angle.cos(), angle.sin()) if rotary else None)
    with torch.no_grad():
        own = model(**given).sample
        before = list(model.attn_processors.values())
        model.set_attn_processor(ExactAttnProcessor())
        exact = model(**given).sample
        assert (own - exact).abs().max() <= 1e-5
        with apply(model, "int8+fp16"):
            low = model(**given).sample
            assert 0 < (own - low).abs().max() < 0.05
            assert coverage(model).modules[1].runs[0][1] == 1
        model.set_attn_processor(dict(zip(model.attn_processors, before)))
        assert torch.equal(model(**given).sample, own)


@pytest.mark.parametrize("choices, words", [
    (dict(backend="cpu"), "unknown backend 'cpu'"), (dict(check_finite="no"), "check_finite is 'no'"),
    (dict(fallback=np.array([1, 2])), "unknown fallback array"), (dict(precision=3), "precision is a string")], ids=str)
def test_choices_that_do_not_exist_are_refused_when_the_processor_is_made(choices, words):
    with pytest.raises((ValueError, TypeError), match=words):
        LowBitAttnProcessor(**choices)


@pytest.mark.parametrize("modules, words", [
    (3, "modules is 3; give a dict"), (["blocks.0"], "modules is .*give a dict"), ({3: "fp16"}, "the pattern 3 names no"),
    ({"blocks.0": 3}, "precision is a string")], ids=str)
def test_modules_that_are_no_patterns_are_refused_and_nothing_is_changed(modules, words):
    model = toy_model.model()
    before = [block.processor for block in model.blocks]
    with pytest.raises((ValueError, TypeError), match=words):
        apply(model, "int8+fp16", modules)
    assert [block.processor for block in model.blocks] == before


@pytest.mark.parametrize("frame", ["mochi", [], None, 3])
def test_a_frame_that_does_not_exist_is_refused(frame):
    with pytest.raises(ValueError, match="unknown frame"):
        declare_attention(toy_model.Attention, frame)
