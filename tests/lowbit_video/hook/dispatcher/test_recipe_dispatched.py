"""Recipes in models that ask diffusers' dispatcher: each head at its rung of the step, compiled too, as before afterwards."""
import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from diffusers.models.attention_dispatch import attention_backend  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import lowbit_video as lv  # noqa: E402
from dispatch_models import MODELS, make, predict, state  # noqa: E402
from lowbit_video import Recipe, UnsupportedError, apply, coverage, denoising_step, remove  # noqa: E402
from lowbit_video.hook.dispatcher.attention import exact_attention  # noqa: E402
from lowbit_video.hook.dispatcher.backend import backend_function  # noqa: E402
from lowbit_video.hook.dispatcher.recipe import RecipeAttention  # noqa: E402
from lowbit_video.hook.recipe.clock import StepClock, clock_of  # noqa: E402
from lowbit_video.hook.recipe.table import LayerPlan, Span  # noqa: E402
from lowbit_video.hook.report import Record  # noqa: E402

pytestmark = pytest.mark.parity
INT8 = "lowbit_int8_fp8"
STEPS = [{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "int8+fp16"},
         {"layers": "*.1.attn1", "heads": "0", "rung": "int4+fp16"}]
EARLY, LATE = "steps 0-0.5: int8+fp16 (reference-lowbit)", "steps 0.5-1: int8+fp8 (reference-lowbit)"


class Caller:
    """A watched module, for what is called without one."""

    def __init__(self):
        self.record = Record("here")


def attention_of(*rungs, fallback=None):
    return RecipeAttention(LayerPlan((Span(0.0, 1.0, rungs),)), StepClock(), {"fallback": fallback})


def runs(model):
    return {module.name: {variant: calls for variant, calls, _ in module.runs} for module in coverage(model).modules}


def at(inputs, timestep):
    return {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}


def test_each_head_is_served_at_its_rung():
    rungs = ("int8+fp8", "exact", "int4+fp16", "int8+fp8", "exact", "int8+fp8 pooled 0.5 always 3")
    q, k, v = torch.randn(3, 2, 300, 6, 64)
    caller = Caller()
    out, lse = attention_of(*rungs).serve(caller, q, k, v, None, None, False, 0.2, True)
    assert out.shape == q.shape and lse.shape == (2, 6, 300)
    without, none = attention_of(*rungs).serve(Caller(), q, k, v, None, None, False, 0.2, False)
    torch.testing.assert_close(without, out, atol=1e-5, rtol=0)  # exact attention with an LSE is another kernel
    assert none is None
    exact = exact_attention(q, k, v, None, False, 0.2)
    for head, rung in enumerate(rungs):
        own = [x[:, :, head:head + 1] for x in (q, k, v)]
        if rung == "exact":
            torch.testing.assert_close(out[:, :, head], exact[:, :, head], atol=1e-5, rtol=0)
        else:
            alone, of = lv.attention(*own, *rung.partition(" pooled")[:1], scale=0.2, return_lse=True,
                                     pooled=lv.Pooled(0.5, 3) if "pooled" in rung else None)
            assert torch.equal(out[:, :, head:head + 1], alone) and torch.equal(lse[:, head:head + 1], of)
    kept, pooled = lv.Pooled(0.5, 3).tiles(2, 1, 300, 300, 64)
    variant = "heads 5: int8+fp8 pooled 0.5 (reference-lowbit)"
    assert pooled > 0 and caller.record.tiles == {variant: (kept, pooled)}
    assert dict(caller.record.calls) == {("heads 0,3: int8+fp8 (reference-lowbit)", ""): 1, ("heads 1,4: exact", ""): 1,
                                         ("heads 2: int4+fp16 (reference-lowbit)", ""): 1, (variant, ""): 1}


def test_masks_are_each_rungs_own():
    q, k, v = torch.randn(3, 2, 70, 3, 64)
    leading = (torch.arange(70) < torch.tensor([[40], [70]]))[:, None, None]
    out, _ = attention_of("int8+fp8", "exact", "int8+fp8").serve(Caller(), q, k, v, leading, None, False, None, False)
    whole, _ = attention_of(*["int8+fp8"] * 3).serve(Caller(), q, k, v, leading, None, False, None, False)
    assert torch.equal(out[:, :, ::2], whole[:, :, ::2]) and not torch.equal(out[:, :, 1], whole[:, :, 1])
    torch.testing.assert_close(out[:, :, 1], exact_attention(q, k, v, leading, False, None)[:, :, 1])
    by_head = torch.randn(2, 3, 1, 70)
    caller = Caller()
    mixed = attention_of("exact", "int8+fp8", "exact", fallback="exact")
    got, _ = mixed.serve(caller, q, k, v, by_head, None, False, None, False)
    torch.testing.assert_close(got, exact_attention(q, k, v, by_head, False, None))
    assert [bool(reason) for _, reason in caller.record.calls] == [False, True]
    with pytest.raises(UnsupportedError, match="'here': the mask is torch.float32.*; apply with fallback='exact', or give"):
        attention_of("exact", "int8+fp8", "exact").serve(Caller(), q, k, v, by_head, None, False, None, False)


def test_pooled_tiles_are_counted_of_each_samples_keys():
    q, k, v = torch.randn(3, 2, 300, 2, 64)
    mask = torch.arange(300) < torch.tensor([[150], [300]])
    caller = Caller()
    attention_of(*["int8+fp8 pooled 0.5"] * 2).serve(caller, q, k, v, mask, None, False, None, False)
    counts = [lv.Pooled(0.5).tiles(1, 2, 300, keys, 64) for keys in (150, 300)]
    assert caller.record.tiles == {"int8+fp8 pooled 0.5 (reference-lowbit, leading keys)": tuple(map(sum, zip(*counts)))}


def test_heads_that_do_not_fit_name_the_module():
    q, k, v = torch.randn(3, 1, 70, 4, 64)
    mixed = attention_of("exact", "int8+fp8", "exact", "int8+fp8")
    with pytest.raises(UnsupportedError, match="module 'here': 2 query heads share each of the 2 key heads, .* gives exact"):
        mixed.serve(Caller(), q, k[:, :, :2], v[:, :, :2], None, None, False, None, False)
    with pytest.raises(UnsupportedError, match="module 'here': the call has 2 heads, and the recipe was resolved for 4"):
        mixed.serve(Caller(), q[:, :, :2], k[:, :, :2], v[:, :, :2], None, None, False, None, False)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_a_recipe_of_one_rung_is_as_its_backend_and_by_layer_as_backends_by_module(name):
    before = state()
    model, inputs = make(name)
    exact = predict(model, inputs)
    lv.register_diffusers()
    with attention_backend(INT8):
        wanted = predict(model, inputs)
    handle = apply(model, Recipe([{"rung": "int8+fp8"}]))
    assert torch.equal(predict(model, inputs), wanted) and not torch.equal(wanted, exact)
    handle.remove()
    assert torch.equal(predict(model, inputs), exact)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    last = "blocks.1.*" if name == "wan" else "single_transformer_blocks.*"
    rest = model.blocks[0] if name == "wan" else model.transformer_blocks[0]
    for module in rest.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = INT8
    wanted = predict(model, inputs)
    for module in rest.modules():
        if hasattr(module, "processor"):
            del module.processor._attention_backend
    with apply(model, Recipe([{"rung": "int8+fp8"}, {"layers": last, "rung": "exact"}])):
        assert torch.equal(predict(model, inputs), wanted)
        report = coverage(model)
    assert "recipe (int8+fp8)" in str(report) and "recipe (exact)" in str(report) and not report.fallbacks
    lv.unregister_diffusers()
    assert state() == before


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx"])
def test_the_timestep_says_the_step(name):
    model, inputs = make(name)
    handle = apply(model, Recipe([{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "exact"}]), fallback="exact")
    for timestep in (1000, 501, 500, 0):
        predict(model, at(inputs, timestep))
    name, ran = next(one for one in runs(model).items() if "exact" in str(one) and "int8" in str(one))
    assert sum(calls for what, calls in ran.items() if what.startswith("steps 0-0.5: exact")) == 2
    assert sum(calls for what, calls in ran.items() if what.startswith("steps 0.5-1: int8+fp8")) == 2
    with denoising_step(model, 0, 2):
        predict(model, at(inputs, 0))
    assert sum(calls for what, calls in runs(model)[name].items() if what.startswith("steps 0-0.5: exact")) == 3
    handle.remove()
    assert clock_of(model).users == 0 and not model._forward_pre_hooks and not model._forward_hooks


def test_a_model_whose_timesteps_are_not_known_is_told_the_step():
    model, inputs = make("flux")
    apply(model, Recipe(STEPS[:2]))
    with pytest.raises(UnsupportedError, match="attention module 'transformer_blocks.0.attn': the recipe has rules for steps.*"
                                               "timesteps of FluxTransformer2DModel are not known here"):
        predict(model, inputs)
    with denoising_step(model, 1, 2):
        predict(model, inputs)
    assert runs(model)["transformer_blocks.0.attn"] == {LATE: 1}
    remove(model)


def test_one_graph_serves_all_blocks_and_steps():
    torch._dynamo.reset()
    counters.clear()
    model, inputs = make("wan")
    apply(model, Recipe(STEPS))
    eager = [predict(model, at(inputs, timestep)) for timestep in (900, 100)]
    once = runs(model)
    assert once["blocks.0.attn1"] == {EARLY: 1, LATE: 1} and len(once["blocks.1.attn1"]) == 4
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    graphs = []
    for timestep, wanted in zip((900, 100), eager):
        assert torch.equal(predict(compiled, at(inputs, timestep)), wanted)
        graphs.append(counters["stats"]["unique_graphs"])
    assert runs(model) == {name: {what: 2 * calls for what, calls in ran.items()} for name, ran in once.items()}
    assert len(set(graphs)) == 1 and not counters["graph_break"] and not torch.equal(*eager)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(predict(model, at(inputs, 100)), eager[1]) and counters["stats"]["unique_graphs"] == 1
    remove(model)
    torch._dynamo.reset()


def test_nested_recipes_copies_and_other_backends_come_off_one_by_one():
    model, inputs = make("wan")
    exact = predict(model, inputs)
    lv.register_diffusers(model)
    model.set_attention_backend("lowbit_int4_fp16")
    low = predict(model, inputs)
    apply(model, Recipe([{"rung": "exact"}]))
    apply(model, Recipe(STEPS))
    mixed = predict(model, at(inputs, 900))
    twin = copy.deepcopy(model)
    assert torch.equal(predict(twin, at(inputs, 900)), mixed) and not torch.equal(mixed, exact)
    assert runs(twin)["blocks.0.attn1"] == {EARLY: 1} and runs(model)["blocks.0.attn1"][EARLY] == 1
    with denoising_step(model, 0, 2):  # the copy has a clock of its own
        predict(twin, at(inputs, 100))
    assert runs(twin)["blocks.0.attn1"] == {EARLY: 1, LATE: 1}
    for one in (model, twin):
        assert remove(one) and torch.equal(predict(one, inputs), exact)
        assert remove(one) and torch.equal(predict(one, inputs), low) and not remove(one)
    assert coverage(model).modules[0].calls > 1 and "lowbit_int4_fp16" in coverage(model).modules[0].processor  # still watched
    assert coverage(twin).modules[0].reason.startswith("not counted")
    lv.unregister_diffusers(model, twin)
    twin.reset_attention_backend()


def test_unregistering_takes_recipes_back():
    model, inputs = make("wan")
    exact = predict(model, inputs)
    apply(model, Recipe(STEPS))
    lv.unregister_diffusers(model)
    assert torch.equal(predict(model, inputs), exact) and remove(model) and torch.equal(predict(model, inputs), exact)
    apply(model, Recipe(STEPS))
    for attention in (model.blocks[0].attn1, model.blocks[0].attn2):
        attention.attention_calls.attention = None
    with pytest.raises(UnsupportedError, match="lowbit_recipe was called by a module that has no recipe"):
        predict(model, inputs)
    remove(model)


@pytest.mark.parametrize("name", MODELS)
def test_presets_know_the_first_layer(name):
    layers = Recipe.load("safe").resolve(make(name)[0]).layers
    assert next(iter(layers.values())).at(0.9).rungs == ("exact", "exact")
    assert list(layers.values())[-1].at(0.9).rungs == ("int8+fp16", "int8+fp16")


def test_modules_come_on_top():
    model, inputs = make("wan")
    apply(model, Recipe([{"rung": "int8+fp8"}]), {"*.attn2": None, "blocks.1.attn1": "int4+fp16"}, backend="reference")
    predict(model, inputs)
    assert runs(model) == {"blocks.0.attn1": {"int8+fp8 (reference-lowbit)": 1}, "blocks.0.attn2": {},
                           "blocks.1.attn1": {"int4+fp16 (reference-lowbit)": 1}, "blocks.1.attn2": {}}
    remove(model)


@pytest.mark.parametrize("given, named, error, says", [
    ({}, {"fused_prologue": True}, UnsupportedError, "WanTransformer3DModel computes norms and positions before it asks"),
    ({"*": lv.LowBitAttnProcessor()}, {}, UnsupportedError, "LowBitAttnProcessor in modules: .* takes rungs by their names"),
    ({"*": "int9"}, {}, ValueError, "unknown precision 'int9'"), ({"b.7.*": "exact"}, {}, ValueError, "names no attention"),
    ({}, {"backend": "cuda"}, ValueError, "unknown backend 'cuda'"), ({}, {"fallback": "low"}, ValueError, "unknown fallback")])
def test_what_cannot_be_changes_nothing(given, named, error, says):
    model, inputs = make("wan")
    exact = predict(model, inputs)
    with pytest.raises(error, match=says):
        apply(model, Recipe([{"rung": "int8+fp8"}]), given, **named)
    assert torch.equal(predict(model, inputs), exact) and not remove(model)
    with pytest.raises(ValueError, match="rule 2: heads 5 are asked of blocks.0.attn1, which has 2"):
        apply(model, Recipe([{"rung": "exact"}, {"heads": "5", "rung": "exact"}]))


def test_modules_that_bypass_the_dispatcher_are_left_and_named():
    model, _ = make("hunyuan")
    with pytest.raises(ValueError, match="layers 'context_embedder.*' names no attention module; there are: transformer_b"):
        apply(model, Recipe([{"rung": "exact"}, {"layers": "context_embedder.*", "rung": "int8+fp8"}]))
    with pytest.raises(UnsupportedError, match="in place of apply.., docs/diffusers.md, or give apply.. a Recipe"):
        apply(make("wan")[0], "int8+fp8")


def test_several_ranks_of_diffusers_are_refused_by_name():
    q = torch.randn(1, 8, 2, 64)
    with pytest.raises(UnsupportedError, match="enable_parallelism, which no recipe serves; take a backend of one precision"):
        backend_function("lowbit_recipe")(q, q, q, _parallel_config=object())


def test_a_pipeline_of_wan_makes_a_video_by_a_recipe():
    """The scheduler's own timesteps, through diffusers' pipeline."""
    model, inputs = make("wan")
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0,
                                                  num_train_timesteps=1000)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, transformer=model, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    text = inputs["encoder_hidden_states"]
    call = lambda: pipe(prompt_embeds=text, negative_prompt_embeds=-text, height=32, width=32, num_frames=5,
                        output_type="latent", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).frames
    exact = call()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply(pipe, Recipe(STEPS[:2]))
    low = call()
    assert 0 < np.abs(low.numpy() - exact.numpy()).max() < 0.1
    assert runs(model)["blocks.0.attn1"] == {EARLY: 4, LATE: 4}  # two steps of both halves of guidance
    remove(pipe)
    assert torch.equal(call(), exact)
