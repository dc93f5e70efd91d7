"""The transformer against goldens written by diffusers, its hooks, and what it says to bad input."""
import inspect
from pathlib import Path

import numpy as np
import paddle
import pytest

from lowbit_video import LowBitAttnProcessor, apply
from lowbit_video.pipelines.cogvideox import transformer as module
from lowbit_video.pipelines.cogvideox.rotary import get_3d_rotary_pos_embed, get_resize_crop_region_for_grid
from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
from lowbit_video.pipelines.shared.compiling import compiled

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
KINDS = ("transformer_2b", "transformer_5b", "transformer_5b_learned", "transformer_15")
TOLERANCE = 1e-4


def load(kind):
    return CogVideoXTransformer3DModel.from_pretrained(GOLDENS / kind), np.load(GOLDENS / kind / "io.npz")


def inputs(arrays, case=0):
    """The golden's inputs as keyword arguments of the model."""
    tensor = lambda name: paddle.to_tensor(arrays[f"{name}_{case}"])
    found = dict(hidden_states=tensor("latents"), encoder_hidden_states=tensor("text"), timestep=tensor("timestep"))
    if f"cos_{case}" in arrays:
        found["image_rotary_emb"] = (tensor("cos"), tensor("sin"))
    return found


def extras(model):
    return dict(ofs=paddle.to_tensor([2.0])) if model.config.ofs_embed_dim else {}


@pytest.mark.parametrize("case", [0, 1], ids=["trained size", "other size"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind, case):
    model, arrays = load(kind)
    with paddle.no_grad():
        out = model(**inputs(arrays, case), **extras(model)).numpy()
    want = arrays[f"out_{case}"]
    assert out.shape == want.shape
    assert np.abs(want).max() > 0.5, "a golden near zero would prove nothing"
    assert np.abs(out - want).max() <= TOLERANCE


def test_every_norm_has_the_epsilon_of_diffusers():
    """Of q and k 1e-6, of the others the configuration's, 1e-5 as published."""
    model, _ = load("transformer_2b")
    found = {name: norm._epsilon for name, norm in model.named_sublayers() if isinstance(norm, paddle.nn.LayerNorm)}
    heads = {name for name in found if name.rpartition(".")[2] in ("norm_q", "norm_k")}
    assert {found[name] for name in heads} == {1e-6} and {found[name] for name in found.keys() - heads} == {1e-5}
    assert len(heads) == 2 * len(model.transformer_blocks)
    assert inspect.signature(type(model)).parameters["norm_eps"].default == 1e-5


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_tables(kind, case):
    model, arrays = load(kind)
    frames, _, height, width = arrays[f"latents_{case}"].shape[1:]
    tables = model.rotary_tables(frames, height, width)
    if f"cos_{case}" not in arrays:
        assert tables is None
        return
    for table, name in zip(tables, ("cos", "sin")):
        np.testing.assert_allclose(table.numpy(), arrays[f"{name}_{case}"], atol=2e-6)


def test_positions_matter():
    """The goldens would not match without positions."""
    model, arrays = load("transformer_5b")
    given = inputs(arrays)
    given.pop("image_rotary_emb")
    assert np.abs(model(**given).numpy() - arrays["out_0"]).max() > 100 * TOLERANCE


def test_one_timestep_for_all():
    model, arrays = load("transformer_2b")
    given = inputs(arrays)
    given["timestep"] = paddle.to_tensor([17, 17])
    want = model(**given).numpy()
    for number in (17, 17.0, paddle.to_tensor(17), paddle.to_tensor([17])):
        given["timestep"] = number
        np.testing.assert_allclose(model(**given).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("kind", ("transformer_2b", "transformer_15"))
def test_a_later_step_copies_nothing_from_the_host_for_which_it_would_wait(kind, monkeypatch):
    """`ofs` is embedded by frequencies of its own."""
    model, arrays = load(kind)
    given, copied = {**inputs(arrays), **extras(model)}, []
    with paddle.no_grad():
        first = model(**given).numpy()
        real = paddle.to_tensor
        monkeypatch.setattr(module.paddle, "to_tensor", lambda *args, **more: copied.append(args) or real(*args, **more))
        again = model(**given).numpy()
        other = model(**{**given, "timestep": given["timestep"] + 7}).numpy()
    assert not copied and np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(model.frequencies) == 1 + (kind == "transformer_15")


def test_shorter_text():
    """A text shorter than max_text_seq_length runs with sine-cosine positions; each sample is independent of the batch."""
    model, arrays = load("transformer_2b")
    given = inputs(arrays)
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :3]
    both = model(**given).numpy()
    one = model(given["hidden_states"][:1], given["encoder_hidden_states"][:1], given["timestep"][:1]).numpy()
    np.testing.assert_allclose(both[:1], one, atol=1e-5)


@pytest.mark.parametrize("kind", ["transformer_2b", "transformer_5b", "transformer_15"])
def test_compiled(kind):
    model, arrays = load(kind)
    given = {**inputs(arrays), **extras(model)}
    with paddle.no_grad():
        want = model(**given).numpy()
        compiled = paddle.jit.to_static(model.forward, full_graph=True)
        got = compiled(**given).numpy()
    assert np.abs(got - want).max() <= 1e-5


RUN_BY_CUSTOM_DEVICES = {
    # no kernels of a device: names of values, constants on the host, and what Python runs
    "builtin.parameter", "builtin.combine", "builtin.split", "builtin.shadow_output", "pd_op.data", "pd_op.full_int_array",
    # Paddle's own, for any custom device and layout; those of unsqueeze and slice are for views only, which a graph has not
    "pd_op.reshape",
    # what a plug-in for inference brings
    "pd_op.full", "pd_op.cast", "pd_op.scale", "pd_op.add", "pd_op.multiply", "pd_op.matmul", "pd_op.layer_norm",
    "pd_op.silu", "pd_op.gelu", "pd_op.concat", "pd_op.split", "pd_op.split_with_num",
}
"""Of Paddle 3.3.1; a graph with any other operator is refused there."""


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_the_graph_of_the_blocks_runs_on_custom_devices(fused):
    model, _ = load("transformer_15")  # one block, and it has rotary positions
    model.to(dtype="float64")  # another type than rotary positions have, as on a GPU: their casts are in the graph
    for parameter in model.parameters():
        parameter.stop_gradient = False  # as of a model that is made, not read
    apply(model, LowBitAttnProcessor("int8+fp16", fused_prologue=fused))
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    tokens = [paddle.zeros([2, length, heads * dim], "float64") for length in (24, 5)]
    tables = (paddle.ones([24, dim]),) * 2
    with paddle.no_grad():
        program, _ = compiled(model).run_blocks.get_concrete_program(
            *tokens, paddle.zeros([2, model.config.time_embed_dim], "float64"), tables)
    names = {op.name() for op in program.main_program.global_block().ops}
    attention = {name for name in names if name.startswith("py_op.lowbit_attention_" + "behind" * fused)}
    assert len(attention) == len(model.transformer_blocks)
    assert names - attention <= RUN_BY_CUSTOM_DEVICES


class Recorder:
    """Calls another processor and counts."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_processors_by_name_and_for_all():
    model, arrays = load("transformer_5b")
    names = [f"transformer_blocks.{i}.attn1.processor" for i in range(2)]
    before = model.attn_processors
    assert list(before) == names
    recorders = {name: Recorder(processor) for name, processor in before.items()}
    model.set_attn_processor(recorders)
    assert model.attn_processors == recorders
    out = model(**inputs(arrays)).numpy()
    assert [recorder.calls for recorder in recorders.values()] == [1, 1]
    assert np.abs(out - arrays["out_0"]).max() <= TOLERANCE

    one = Recorder(before[names[0]])
    model.set_attn_processor(one)
    model(**inputs(arrays))
    assert one.calls == 2
    model.set_attn_processor(before)
    assert all(model.attn_processors[name] is before[name] for name in names)


def test_a_layer_as_processor_is_no_part_of_the_model():
    model, _ = load("transformer_2b")
    keys = list(model.state_dict())

    class Processor(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.linear = paddle.nn.Linear(2, 2)

    model.set_attn_processor(Processor())
    assert list(model.state_dict()) == keys
    model.set_attn_processor(lambda *args: None)


@pytest.mark.parametrize("change, words", [
    (lambda p: p.pop("transformer_blocks.0.attn1.processor"), "missing: transformer_blocks.0.attn1.processor"),
    (lambda p: p.update({"transformer_blocks.9.attn1.processor": print}), "unknown: transformer_blocks.9.attn1.processor"),
])
def test_wrong_processor_names(change, words):
    model, _ = load("transformer_2b")
    processors = model.attn_processors
    before = dict(processors)
    change(processors)
    with pytest.raises(ValueError, match=words):
        model.set_attn_processor(processors)
    assert model.attn_processors == before


def test_a_processor_must_be_callable():
    model, _ = load("transformer_2b")
    with pytest.raises(TypeError, match="callable, got str"):
        model.set_attn_processor("int8+fp16")
    before = model.attn_processors
    with pytest.raises(TypeError, match="callable, got str"):
        model.set_attn_processor({name: "int8" for name in before})
    assert model.attn_processors == before


@pytest.mark.parametrize("kind, change, words", [
    ("transformer_2b", dict(hidden_states=paddle.zeros([2, 3, 4, 9, 12])), "do not divide into patches"),
    ("transformer_15", dict(hidden_states=paddle.zeros([2, 3, 4, 8, 12])), "frames that are a multiple of 2"),
    ("transformer_2b", dict(hidden_states=paddle.zeros([2, 3, 5, 8, 12])), r"\[batch, frames, 4, height, width\], got"),
    ("transformer_2b", dict(encoder_hidden_states=paddle.zeros([2, 5, 13])), r"\[batch, tokens, 12\], got \[2, 5, 13\]"),
    ("transformer_2b", dict(encoder_hidden_states=paddle.zeros([1, 5, 12])), "the batch must agree"),
    ("transformer_2b", dict(timestep_cond=paddle.zeros([2, 8])), "timestep_cond"),
    ("transformer_2b", dict(ofs=paddle.zeros([1])), "this one has none"),
    ("transformer_15", dict(ofs=None), "this one needs it"),
    ("transformer_5b", dict(image_rotary_emb=(paddle.zeros([9, 16]),) * 2), r"cos is \[9, 16\], these latents need \[72, 16\]"),
    ("transformer_5b_learned", dict(hidden_states=paddle.zeros([2, 3, 4, 8, 10]), image_rotary_emb=None),
     "latents of 8 x 12 only, got 8 x 10"),
    ("transformer_5b_learned", dict(encoder_hidden_states=paddle.zeros([2, 4, 12])), "5 text tokens only"),
])
def test_bad_input(kind, change, words):
    model, arrays = load(kind)
    with pytest.raises(ValueError, match=words):
        model(**{**inputs(arrays), **extras(model), **change})


@pytest.mark.parametrize("change, words", [
    (dict(use_learned_positional_embeddings=True), "needs use_rotary_positional_embeddings"),
    (dict(patch_size_t=2), "needs rotary positions"),
    (dict(activation_fn="geglu"), "activation_fn 'geglu' is not supported"),
    (dict(timestep_activation_fn="tanhshrink"), "timestep_activation_fn 'tanhshrink' is not supported"),
])
def test_bad_configuration(change, words):
    config = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=12)
    with pytest.raises(ValueError, match=words):
        CogVideoXTransformer3DModel(**{**config, **change})


@pytest.mark.parametrize("theta", [100.0, 10000.0])
def test_rotary_angles_by_hand(theta):
    """A quarter of the head dim turns with the frame, three eighths each with row and column, at theta's frequencies."""
    cos, sin = get_3d_rotary_pos_embed(32, None, (3, 4), 2, theta=theta, grid_type="slice", max_size=(3, 4))
    frame, row, column = 1, 2, 3
    angles = [place / theta ** (2 * i / dim) for place, dim in ((frame, 8), (row, 12), (column, 12)) for i in range(dim // 2)]
    at = (frame * 3 + row) * 4 + column
    np.testing.assert_allclose(cos.numpy()[at], np.cos(np.repeat(angles, 2)), atol=1e-6)
    np.testing.assert_allclose(sin.numpy()[at], np.sin(np.repeat(angles, 2)), atol=1e-6)


def test_rotary_errors():
    with pytest.raises(ValueError, match="larger than the 4 x 6"):
        get_3d_rotary_pos_embed(16, None, (5, 6), 2, grid_type="slice", max_size=(4, 6))
    with pytest.raises(ValueError, match="multiple of 16, not 24"):
        get_3d_rotary_pos_embed(24, ((0, 0), (2, 2)), (2, 2), 2)
    with pytest.raises(ValueError, match="'spline' is not known"):
        get_3d_rotary_pos_embed(16, None, (2, 2), 2, grid_type="spline")


def test_crop_of_a_square_in_a_wide_grid():
    assert get_resize_crop_region_for_grid((20, 20), 45, 30) == ((0, 8), (30, 38))
    assert get_resize_crop_region_for_grid((30, 45), 45, 30) == ((0, 0), (30, 45))


def test_published_sizes_have_the_published_token_counts():
    """2b: 226 + 17550 tokens; 1.5 at 768 x 1360, 81 frames: 44880 video tokens."""
    config = dict(num_attention_heads=1, attention_head_dim=64, num_layers=0, text_embed_dim=4, time_embed_dim=4)
    model = CogVideoXTransformer3DModel(**config, use_rotary_positional_embeddings=True)
    assert model.rotary_tables(13, 60, 90)[0].shape == [17550, 64]
    newer = dict(patch_size_t=2, sample_height=300, sample_width=300, use_rotary_positional_embeddings=True)
    model = CogVideoXTransformer3DModel(**config, **newer)
    assert model.rotary_tables(22, 96, 170)[0].shape == [44880, 64]


def test_importing_needs_no_processors():
    assert not hasattr(module, "ExactAttnProcessor")
