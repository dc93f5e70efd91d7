"""The order of tokens in diffusers' CogVideoX, by hooks: rounding alone changes, and nothing is left of it afterwards."""
import copy

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from torch._dynamo.utils import counters  # noqa: E402

from lowbit_video import UnsupportedError, apply, coverage, order_tokens, parallelize  # noqa: E402
from lowbit_video.hook.order import order_of  # noqa: E402
from lowbit_video.token_order import token_order  # noqa: E402
from ranks import run_threads  # noqa: E402

import diffusers_models  # noqa: E402
from helpers import sqnr_db  # noqa: E402

pytestmark = pytest.mark.parity

KINDS = {"2b": {}, "5b": dict(use_rotary_positional_embeddings=True),
         "1.5": dict(use_rotary_positional_embeddings=True, patch_size_t=2)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()


def make(kind="5b", layers=2):
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=10,
        num_layers=layers, sample_width=16, sample_height=16, sample_frames=13, max_text_seq_length=9, **KINDS[kind]).eval()


def inputs(model, batch=2, frames=4, height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    given = dict(hidden_states=torch.randn(batch, frames, 4, height, width, generator=generator),
                 encoder_hidden_states=torch.randn(batch, 9, 10, generator=generator), timestep=torch.arange(batch) + 7)
    if model.config.use_rotary_positional_embeddings:
        tokens = frames // (model.config.patch_size_t or 1) * height * width // 4
        angle = torch.randn(tokens, 16, generator=generator).repeat_interleave(2, dim=1)
        given["image_rotary_emb"] = (angle.cos(), angle.sin())
    return given


def predict(model, given, positional=False):
    with torch.no_grad():
        if positional:
            return model(*list(given.values())[:3], None, None, given.get("image_rotary_emb"), None, False)[0]
        return model(**given, return_dict=False)[0]


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("order", ["tiles", "hilbert"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_changes_rounding_alone_and_leaves_nothing(kind, order):
    model = make(kind)
    given = inputs(model, height=12)
    exact, before = predict(model, given), dict(vars(model))
    with order_tokens(model, order):
        assert order_of(model) == order and hooks(model) == 3
        for positional in (False, True):
            assert sqnr_db(predict(model, given, positional).numpy(), exact.numpy()) > 100
    assert order_of(model) == "raster" and hooks(model) == 0 and vars(model).keys() == before.keys()
    assert torch.equal(predict(model, given), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_get_tokens_and_angles_in_order_and_text_as_it_was(kind):
    model = make(kind)
    given, seen = inputs(model), []
    note = lambda block, given, named: seen.append({name: named[name] for name in (
        "hidden_states", "encoder_hidden_states", "image_rotary_emb")})
    model.transformer_blocks[1].register_forward_pre_hook(note, with_kwargs=True)
    model.transformer_blocks[0].forward = lambda hidden_states, encoder_hidden_states, **rest: (
        hidden_states, encoder_hidden_states)  # so that no other rounding is seen
    predict(model, given)
    order_tokens(model, "hilbert")
    predict(model, given)
    raster, ordered = seen
    places = torch.tensor(token_order("hilbert", 2 if kind == "1.5" else 4, 8, 8))
    assert torch.equal(ordered["hidden_states"], raster["hidden_states"][:, places])
    assert torch.equal(ordered["encoder_hidden_states"], raster["encoder_hidden_states"])
    for got, angles in zip(ordered["image_rotary_emb"] or (), raster["image_rotary_emb"] or ()):
        assert torch.equal(got, angles[places]) and not torch.equal(got, angles)


def test_orders_follow_each_other_and_handles_come_off_one_at_a_time():
    model = make()
    first = order_tokens(model, "tiles")
    second = order_tokens(model, "hilbert")
    assert hooks(model) == 3 and order_of(model) == "hilbert"
    second.remove()
    assert hooks(model) == 3 and order_of(model) == "tiles"
    first.remove()
    assert hooks(model) == 0 and order_of(model) == "raster"


def test_a_copy_has_hooks_of_its_own():
    model = make()
    given = inputs(model)
    order_tokens(model, "hilbert")
    twin = copy.deepcopy(model)
    assert torch.equal(predict(twin, given), predict(model, given)) and order_of(twin) == "hilbert"
    order_tokens(twin, "raster")
    assert (hooks(twin), hooks(model)) == (0, 3)


def test_a_compiled_model_orders_its_tokens_in_any_grid():
    """Without a graph break; of the tables before its forward torch makes a graph apart."""
    model = make("1.5", layers=1)
    apply(model, "int8+fp16")
    order_tokens(model, "hilbert")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    given = inputs(model)
    assert torch.equal(predict(compiled, given), predict(model, given))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    other = inputs(model, height=12, frames=2)
    assert torch.equal(predict(compiled, other), predict(model, other))


def test_a_compiled_model_is_compiled_again_when_the_order_changes():
    """torch.compile does not look at hooks again: half of them would be seen, and tables of another order than the tokens."""
    model = make(layers=1)
    given = inputs(model)
    exact, compiled = predict(model, given), torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(predict(compiled, given), exact)
    for order in ("hilbert", "raster"):
        order_tokens(compiled, order)  # the same as of the model
        assert order_of(model) == order and torch.equal(predict(compiled, given), predict(model, given))
    assert torch.equal(predict(compiled, given), exact)


@pytest.mark.parametrize("first", ["order", "parallelize"])
@pytest.mark.parametrize("degrees", [dict(ulysses=2, cfg=1), dict(ring=2, cfg=1), dict(cfg=2)], ids=str)
def test_ranks_share_tokens_that_are_in_order(degrees, first):
    given = inputs(make())
    wanted, models = predict(make(), given), [make() for _ in range(2)]  # here: threads share one generator
    for model in models:
        apply(model, "exact")
        if first == "order":
            order_tokens(model, "hilbert")

    def work(wire):
        model = models[wire.rank]
        with parallelize(model, wire=wire, **degrees):
            if first == "parallelize":
                order_tokens(model, "hilbert")
            shared = predict(model, given)
        return shared, predict(model, given), [module.calls for module in coverage(model).modules]

    for shared, alone, calls in run_threads(2, work):
        assert sqnr_db(shared.numpy(), wanted.numpy()) > 90 and sqnr_db(alone.numpy(), wanted.numpy()) > 90
        assert calls == [3, 3] if "ring" in degrees else [2, 2]


def test_gradients_flow_through_the_order():
    model = make(layers=1)
    found = []
    for order in ("raster", "hilbert"):
        with order_tokens(model, order):
            latents = inputs(model)["hidden_states"].requires_grad_()
            model(**{**inputs(model), "hidden_states": latents})[0].square().sum().backward()
            found.append(latents.grad.numpy())
    assert sqnr_db(found[1], found[0]) > 90


@pytest.mark.parametrize("name", ["consisid", "mochi", "sd3"])
def test_other_models_are_refused_by_name(name):
    model, _ = diffusers_models.make(name)
    with pytest.raises(UnsupportedError, match=f"{type(model).__name__} cannot have its tokens ordered: .* declared are"):
        order_tokens(model, "hilbert")
    assert order_of(model) == "raster" and hooks(model) == 0


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    class Same(diffusers.CogVideoXTransformer3DModel):
        pass

    class Other(diffusers.CogVideoXTransformer3DModel):
        def forward(self, *given, **named):
            return super().forward(*given, **named)

    sizes = dict(num_attention_heads=1, attention_head_dim=16, num_layers=0, text_embed_dim=4, time_embed_dim=4)
    order_tokens(Same(**sizes), "tiles")
    with pytest.raises(UnsupportedError, match="Other cannot have its tokens ordered"):
        order_tokens(Other(**sizes), "tiles")


def test_the_operator_passes_torchs_own_checks():
    torch.library.opcheck(torch.ops.lowbit_video.token_order.default, (torch.zeros(2), "tiles", 3, 4, 5, True))
