"""The order of tokens in our transformer: nothing but rounding changes, alone, hooked, compiled and on several ranks."""
import copy
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest

from lowbit_video import Recipe, UnsupportedError, apply, order_tokens, parallelize
from lowbit_video.hook.order import order_of
from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline
from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
from lowbit_video.token_order import token_order
from ranks import run_threads

from helpers import sqnr_db

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
KINDS = ("transformer_2b", "transformer_5b", "transformer_5b_learned", "transformer_15")
CALL = dict(num_inference_steps=2, num_frames=9, height=48, width=80, seed=3, progress=False, output_type="latent")
FLOAT32_DB = 100.0


def load(kind):
    """(model, its inputs)."""
    model, arrays = CogVideoXTransformer3DModel.from_pretrained(GOLDENS / kind), np.load(GOLDENS / kind / "io.npz")
    given = dict(hidden_states=arrays["latents_0"], encoder_hidden_states=arrays["text_0"], timestep=arrays["timestep_0"])
    given = {name: paddle.to_tensor(array) for name, array in given.items()}
    if "cos_0" in arrays:
        given["image_rotary_emb"] = (paddle.to_tensor(arrays["cos_0"]), paddle.to_tensor(arrays["sin_0"]))
    if model.config.ofs_embed_dim:
        given["ofs"] = paddle.to_tensor([2.0])
    return model, given


def predict(model, given):
    with paddle.no_grad():
        return model(**given).numpy()


@pytest.mark.parametrize("order", ["tiles", "hilbert"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_changes_rounding_alone(kind, order):
    model, given = load(kind)
    exact = predict(model, given)
    with order_tokens(model, order):
        assert order_of(model) == order
        assert sqnr_db(predict(model, given), exact) > FLOAT32_DB
    assert order_of(model) == "raster" and np.array_equal(predict(model, given), exact)


def watch_blocks(model):
    """What blocks were given, (video, text, sines) a call; in their place all tokens are treated alike, and none are summed."""
    seen, values = [], model.proj_out.weight.shape[1]

    def blocks(video, text, temb, rotary=None):
        seen.append((video.numpy(), text.numpy(), None if rotary is None else rotary[1].numpy()))
        return video[:, :, :values] * (1 if rotary is None else (rotary[0] + 2 * rotary[1])[:, :1])

    model.run_blocks = blocks
    return seen


def grid_of(model, latents):
    _, frames, _, height, width = latents.shape
    return frames // (model.config.patch_size_t or 1), height // 2, width // 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_blocks_see_is_in_order_and_comes_back_to_the_bit(kind):
    model, given = load(kind)
    seen = watch_blocks(model)
    wanted = predict(model, given)
    order_tokens(model, "hilbert")
    assert np.array_equal(predict(model, given), wanted)
    places = token_order("hilbert", *grid_of(model, given["hidden_states"]))
    (video, text, sines), (ordered, same_text, ordered_sines) = seen
    assert np.array_equal(ordered, video[:, places]) and not np.array_equal(ordered, video)
    assert np.array_equal(same_text, text)
    assert sines is None or np.array_equal(ordered_sines, sines[places]) and not np.array_equal(ordered_sines, sines)


def test_other_sizes_and_orders_follow_each_other():
    model, given = load("transformer_2b")
    seen = watch_blocks(model)
    for order, shape in (("tiles", [2, 3, 4, 8, 12]), ("tiles", [2, 3, 4, 12, 8]), ("hilbert", [2, 3, 4, 12, 8]),
                         ("hilbert", [2, 1, 4, 6, 6])):
        call = {**given, "hidden_states": paddle.arange(np.prod(shape), dtype="float32").reshape(shape)}
        with order_tokens(model, order):
            got = predict(model, call)
        assert np.array_equal(got, predict(model, call))
        assert np.array_equal(seen[-2][0], seen[-1][0][:, token_order(order, *grid_of(model, call["hidden_states"]))])


def test_a_compiled_forward_has_the_order_that_it_was_compiled_with():
    model, given = load("transformer_15")
    exact = predict(model, given)
    order_tokens(model, "hilbert")
    with paddle.no_grad():
        got = paddle.jit.to_static(model.forward, full_graph=True)(**given).numpy()
    assert sqnr_db(got, exact) > FLOAT32_DB
    paddle.jit.to_static(model, full_graph=True)
    with pytest.raises(UnsupportedError, match=r"the whole forward of this model is compiled, .* with pipe.compile\(\)"):
        order_tokens(model, "raster")


def test_a_copy_keeps_the_order_and_has_its_own():
    model, given = load("transformer_5b")
    order_tokens(model, "hilbert")
    ordered, twin = predict(model, given), copy.deepcopy(model)
    assert order_of(twin) == "hilbert" and np.array_equal(predict(twin, given), ordered)
    order_tokens(twin, "raster")
    assert order_of(model) == "hilbert"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_random_pipeline(tmp_path_factory.mktemp(kind), kind=kind) for kind in ("2b", "1.5")}


def make(folder, precision="exact", order=None, wire=None, compiled=False, **degrees):
    """Latents of a pipeline with all of that."""
    pipe = CogVideoXPipeline.from_pretrained(folder, device="cpu")
    if compiled:
        pipe.compile()
    apply(pipe, precision)
    if wire is not None:
        parallelize(pipe, wire=wire, **degrees)
    if order is not None:
        order_tokens(pipe, order)
    return pipe("a cat", **CALL).frames.numpy()


def test_a_pipeline_with_a_recipe_compiled_and_in_order(folders):
    recipe = Recipe.load("safe")
    exact, low = make(folders["2b"]), make(folders["2b"], recipe)
    got = make(folders["2b"], recipe, "hilbert", compiled=True)
    assert abs(sqnr_db(got, exact) - sqnr_db(low, exact)) < 3 and not np.array_equal(got, low)


@pytest.mark.parametrize("kind, degrees", [("2b", dict(ulysses=2, cfg=1)), ("1.5", dict(ring=2, cfg=1)), ("1.5", dict(cfg=2))],
                         ids=str)
def test_ranks_share_tokens_that_are_in_order(folders, kind, degrees):
    alone = make(folders[kind])
    for got in run_threads(2, lambda wire: make(folders[kind], order="tiles", wire=wire, **degrees)):
        assert sqnr_db(got, alone) > 90


def test_ranks_with_other_orders_are_told(folders):
    def work(wire):
        with pytest.raises(ValueError, match="different settings .token_order: 'raster' and 'tiles'"):
            make(folders["2b"], order=("raster", "tiles")[wire.rank], wire=wire)

    run_threads(2, work)


def test_what_is_no_order_or_no_known_model_is_refused():
    model, _ = load("transformer_2b")
    with pytest.raises(ValueError, match="unknown token order 'zigzag'; there are: raster, tiles, hilbert"):
        order_tokens(model, "zigzag")
    with pytest.raises(UnsupportedError, match="Linear cannot have its tokens ordered: .* declared are the CogVideoX"):
        order_tokens(paddle.nn.Linear(2, 2), "tiles")


def test_a_recipe_of_another_order_is_told_whichever_comes_first():
    model, _ = load("transformer_2b")
    recipe = lambda order: Recipe([{"rung": "exact"}], {"order": order} if order else {}, source="mine.toml")
    says = "mine.toml was calibrated with the tokens in the order 'hilbert', and this model has them in '{}'.*--order hilbert"
    with pytest.warns(UserWarning, match=says.format("raster")) as told:
        handle = apply(model, recipe("hilbert"))
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        order_tokens(model, "hilbert")
    with pytest.warns(UserWarning, match=says.format("tiles")) as told:
        order_tokens(model, "tiles")
    assert [warning.filename for warning in told] == [__file__]
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        order_tokens(model, "hilbert")
        for right in ("hilbert", None):
            apply(model, recipe(right)).remove()
        apply(model, "int8+fp16")
        order_tokens(model, "raster")
    order_tokens(model, "tiles")
    with pytest.warns(UserWarning, match="in the order 'raster', and this model has them in 'tiles'"):
        apply(model, recipe("raster"))
