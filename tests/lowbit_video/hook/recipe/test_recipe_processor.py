"""A recipe in a model: every head runs its rung of every step, the report says so, and `remove` gives back what was there."""
import copy

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import (  # noqa: E402
    LowBitAttnProcessor,
    Pooled,
    Recipe,
    UnsupportedError,
    apply,
    attention,
    coverage,
    denoising_step,
    remove,
)
from lowbit_video.distributed.group import Group  # noqa: E402
from lowbit_video.distributed.mesh import Degrees, Mesh  # noqa: E402
from lowbit_video.distributed.ring import ring  # noqa: E402
from lowbit_video.distributed.ulysses import ulysses  # noqa: E402
from lowbit_video.hook.attend import coded  # noqa: E402
from lowbit_video.hook.recipe.clock import StepClock, clock_of  # noqa: E402
from lowbit_video.hook.recipe.processor import RecipeAttnProcessor  # noqa: E402
from lowbit_video.hook.recipe.table import LayerPlan, Span  # noqa: E402
from lowbit_video.pipelines import load, make_random_pipeline  # noqa: E402
from ranks import run_threads  # noqa: E402

import toy_model  # noqa: E402
from helpers import qkv, sqnr_db  # noqa: E402

MIXED = ("int8+fp8", "int4+fp16", "int4+fp16", "int8+fp8")
STEPS = [{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "int8+fp16"}]
CALL = dict(num_inference_steps=4, num_frames=9, height=32, width=48, seed=3, progress=False)
APART = "; prologue apart: pooling needs the means of tiles of normed keys first"


def processor(*rungs, **hook):
    return RecipeAttnProcessor(LayerPlan((Span(0.0, 1.0, rungs),)), StepClock(), **hook)


def tensors(framework, heads=4, kv_heads=None, tokens=70):
    return [framework.tensor(a) for a in qkv(2, heads, kv_heads, tokens, dim=32)]


def outputs(model):
    with paddle.no_grad():
        return [part.numpy() for part in model(**toy_model.inputs())]


def runs(model):
    return [{variant: calls for variant, calls, _ in module.runs} for module in coverage(model).modules]


@pytest.mark.parametrize("rungs", [MIXED, ("exact", "exact", "int2+fp16", "int8+fp16")], ids=["apart", "side by side"])
@pytest.mark.parametrize("causal", [False, True])
def test_each_head_is_computed_at_its_rung(framework, rungs, causal):
    q, k, v = tensors(framework)
    out, lse = processor(*rungs).attend(q, k, v, is_causal=causal, scale=0.3, return_lse=True)
    assert np.array_equal(framework.numpy(processor(*rungs).attend(q, k, v, causal, 0.3)), framework.numpy(out))
    for head, rung in enumerate(rungs):
        cut = slice(head, head + 1)
        alone = LowBitAttnProcessor(rung).attend(q[:, :, cut], k[:, :, cut], v[:, :, cut], causal, 0.3, True)
        np.testing.assert_array_equal(framework.numpy(out[:, :, cut]), framework.numpy(alone[0]))
        np.testing.assert_array_equal(framework.numpy(lse[:, cut]), framework.numpy(alone[1]))


def test_tensors_with_strides_are_cut_right(framework):
    q, k, v = tensors(framework)
    wanted = framework.numpy(processor(*MIXED).attend(q, k, v))
    by_heads = [framework.tensor(framework.numpy(t).transpose(0, 2, 1, 3)) for t in (q, k, v)]
    turned = [t.transpose([0, 2, 1, 3]) if framework.name == "paddle" else t.transpose(1, 2) for t in by_heads]
    assert not turned[0].is_contiguous()
    np.testing.assert_array_equal(framework.numpy(processor(*MIXED).attend(*turned)), wanted)


def test_heads_that_share_keys(framework):
    q, k, v = tensors(framework, heads=6, kv_heads=3)
    rungs = ("int8+fp8", "int8+fp8", "int4+fp16", "int4+fp16", "int8+fp8", "int8+fp8")
    out = processor(*rungs).attend(q, k, v)
    for kv in range(3):
        cut, own = slice(2 * kv, 2 * kv + 2), slice(kv, kv + 1)
        alone = LowBitAttnProcessor(rungs[2 * kv]).attend(q[:, :, cut], k[:, :, own], v[:, :, own])
        np.testing.assert_array_equal(framework.numpy(out[:, :, cut]), framework.numpy(alone))
    with pytest.raises(UnsupportedError, match="2 query heads share each of the 3 key heads.*fp8 to heads 0,3.*heads 0-3"):
        processor("int4+fp8", "int4+fp16", "int4+fp16", "int4+fp8", "exact", "exact").attend(q, k, v)


@pytest.mark.parametrize("by_head", [False, True])
def test_masks_are_each_rungs_own(framework, by_head):
    q, k, v = tensors(framework)
    values = np.where(np.random.default_rng(0).random((2, 4 if by_head else 1, 1, 70)) < 0.3, -1e9, 0.0)
    mask = framework.tensor(values)
    out = framework.numpy(processor(*MIXED, fallback="exact").attend_masked(q, k, v, mask))
    wanted = LowBitAttnProcessor("int8+fp8", fallback="exact").attend_masked(q, k, v, mask)
    np.testing.assert_allclose(out, framework.numpy(wanted), atol=1e-6)
    with pytest.raises(UnsupportedError, match="no low-bit kernel takes a mask"):
        processor(*MIXED).attend_masked(q, k, v, mask)
    wanted = framework.numpy(LowBitAttnProcessor("exact", fallback="exact").attend_masked(q, k, v, mask))
    exact = processor(*["exact"] * 4, fallback="exact").attend_masked(q, k, v, mask)
    np.testing.assert_array_equal(framework.numpy(exact), wanted)


def test_heads_of_one_rung_are_not_copied(monkeypatch):
    one = processor(*["int8+fp8"] * 3)
    seen = []
    monkeypatch.setattr(LowBitAttnProcessor, "attend", lambda self, *call: seen.append(call) or "out")
    assert one.attend(1, 2, 3, True, 0.5, True) == "out" and seen == [(1, 2, 3, True, 0.5, True, None)]


def test_a_call_of_other_heads_is_refused():
    q = paddle.randn([1, 9, 2, 32])
    with pytest.raises(UnsupportedError, match="the call has 2 heads, and the recipe was resolved for 4"):
        processor(*MIXED).attend(q, q, q)


def test_options_reach_every_rung_and_the_description():
    made = processor(*MIXED, fallback="exact", backend="reference", check_finite=False)
    assert str(made) == "RecipeAttnProcessor(int8+fp8, int4+fp16, fallback=exact, backend=reference)"
    assert made.low_bit and made.differentiable and not processor(*MIXED).differentiable
    assert not processor("exact", "fp16").low_bit
    options = processor("int4+fp16", fallback="exact", backend="reference", check_finite=False).options(True, 0.5, True)
    assert (str(options.precision), options.is_causal, options.scale, options.return_lse) == ("int4+fp16", True, 0.5, True)
    assert (options.backend, options.check_finite, options.only_if_faster) == ("reference", False, True)
    with pytest.raises(ValueError, match="unknown fallback"):
        processor("exact", fallback="other")


def test_a_recipe_by_layer_is_as_precisions_by_module():
    model, twin = toy_model.model(), toy_model.model()
    before = [block.processor for block in model.blocks]
    apply(twin, "int8+fp8", {"blocks.1": "int4+fp16"})
    apply(model, Recipe([{"rung": "int8+fp8"}, {"layers": "*.1", "rung": "int4+fp16"}]))
    for got, wanted in zip(outputs(model), outputs(twin)):
        np.testing.assert_array_equal(got, wanted)
    assert runs(model) == [{"int8+fp8 (reference-lowbit, fused prologue)": 1},
                           {"int4+fp16 (reference-lowbit, fused prologue)": 1}]
    assert [module.processor for module in coverage(model).modules] == ["RecipeAttnProcessor(int8+fp8)",
                                                                        "RecipeAttnProcessor(int4+fp16)"]
    assert remove(model) and [block.processor for block in model.blocks] == before


def test_layers_that_are_alike_share_a_processor_and_modules_come_on_top():
    model = toy_model.model()
    apply(model, Recipe([{"rung": "int8+fp8"}]))
    assert model.blocks[0].processor is model.blocks[1].processor
    before = model.blocks[1].processor
    apply(model, Recipe([{"rung": "int8+fp16"}]), {"blocks.1": None})
    assert str(model.blocks[0].processor) == "RecipeAttnProcessor(int8+fp16)" and model.blocks[1].processor is before
    apply(model, Recipe([{"rung": "int8+fp16"}]), {"blocks.1": "int4+fp16"})
    assert str(model.blocks[1].processor) == "LowBitAttnProcessor(int4+fp16)"


def test_a_recipe_that_does_not_fit_changes_nothing():
    model = toy_model.model()
    before = [block.processor for block in model.blocks]
    with pytest.raises(ValueError, match="r, rule 2: heads 2 are asked of blocks.0, which has 2"):
        apply(model, Recipe([{"rung": "exact"}, {"heads": [2], "rung": "exact"}], source="r"))
    assert [block.processor for block in model.blocks] == before and not remove(model)


def test_a_step_runs_its_rung_and_the_report_tells_them_apart():
    model = toy_model.model()
    apply(model, Recipe([*STEPS, {"layers": "*.1", "heads": [1], "steps": "0.5-1", "rung": "exact"}]))
    for step in range(4):
        with denoising_step(model, step, 4):
            outputs(model)
    assert runs(model) == [
        {"steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)": 2,
         "steps 0.5-1: int8+fp8 (reference-lowbit, fused prologue)": 2},
        {"steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)": 2,
         "steps 0.5-1, heads 0: int8+fp8 (reference-lowbit, fused prologue)": 2,
         "steps 0.5-1, heads 1: exact (reference-exact)": 2}]
    assert coverage(model).summary() == ("1 of 2 attention modules ran at low bit in every call (1 exact in some calls, as the "
                                         "recipe says)")


def test_rungs_fuse_norms_and_positions_or_say_why_not():
    rules = [*STEPS, {"layers": "*.1", "heads": [1], "steps": "0.5-1", "rung": "exact"}]
    rules += [{"layers": "*.1", "heads": [0], "steps": "0.5-1", "rung": "int8+fp8 pooled 0.9"}]
    found = []
    for fused in (True, False):
        model = toy_model.model()
        for number, block in enumerate(model.blocks, 1):
            block.norm_q.weight.set_value(1 + 0.2 * number * paddle.arange(32, dtype="float32").sin())
            block.norm_k.bias.set_value(0.5 * paddle.arange(32, dtype="float32").cos())
        apply(model, Recipe(rules), fused_prologue=fused)
        for step in (0, 3):
            with denoising_step(model, step, 4):
                found.append(outputs(model))
        if fused:
            assert runs(model) == [
                {"steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)": 1,
                 "steps 0.5-1: int8+fp8 (reference-lowbit, fused prologue)": 1},
                {"steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)": 1,
                 "steps 0.5-1, heads 0: int8+fp8 pooled 0.9 (reference-lowbit" + APART + ")": 1,
                 "steps 0.5-1, heads 1: exact (reference-exact)": 1}]
            assert "1 exact in some calls, as the recipe says" in coverage(model).summary()
            assert str(model.blocks[0].processor).endswith("(int8+fp16, int8+fp8, fused_prologue=True)")
    for one, other in zip(found[0] + found[1], found[2] + found[3]):
        assert sqnr_db(one, other) > 50


def test_outside_of_a_step_is_an_error_that_names_the_module():
    model = toy_model.model()
    apply(model, Recipe(STEPS))
    with pytest.raises(UnsupportedError, match="module 'blocks.0': the recipe has rules for steps.*timesteps of Model are not"):
        outputs(model)
    with denoising_step(model, 0, 2), denoising_step(model, 1, 2):
        outputs(model)
    assert list(runs(model)[0]) == ["steps 0.5-1: int8+fp8 (reference-lowbit, fused prologue)"]
    with pytest.raises(UnsupportedError, match="in no step"):
        outputs(model)
    apply(model, Recipe([{"rung": "int8+fp8"}]))
    outputs(model)  # no rules for steps, and no step is asked for


@pytest.mark.parametrize("step, steps, says", [(4, 4, "step is 4; give at most 3"), (-1, 4, "step is -1"), (0, 0, "steps is 0"),
                                               (0.5, 4, "step is 0.5")])
def test_a_step_that_is_none_is_refused(step, steps, says):
    with pytest.raises((ValueError, TypeError), match=says):
        with denoising_step(toy_model.model(), step, steps):
            pass


def test_copies_and_nested_recipes_have_their_own_steps():
    model = toy_model.model()
    apply(model, Recipe([{"rung": "exact"}]))
    apply(model, Recipe(STEPS))
    twin = copy.deepcopy(model)
    with denoising_step(model, 0, 2), denoising_step(twin, 1, 2):
        outputs(model)
        outputs(twin)
    assert list(runs(model)[0]) == ["steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)"]
    assert list(runs(twin)[0])[-1] == "steps 0.5-1: int8+fp8 (reference-lowbit, fused prologue)"
    assert remove(twin) and str(twin.blocks[0].processor) == "RecipeAttnProcessor(exact)"
    assert len(model.blocks[0].processor.plan.spans) == 2 and clock_of(twin) is not clock_of(model)


@pytest.mark.parametrize("compiled", [False, True])
def test_our_pipeline_tells_the_step(tmp_path, compiled):
    pipe = load(make_random_pipeline(tmp_path), device="cpu")
    apply(pipe, Recipe([{"rung": "int8+fp16"}]))
    one = pipe("snow", **CALL).frames
    remove(pipe)
    apply(pipe, Recipe([{"rung": "int2+fp16"}, {"steps": "0-0.5", "rung": "int8+fp16"}, {"steps": "0.75-1", "rung": "exact"}]))
    if compiled:
        pipe.compile()
    got = pipe("snow", **CALL).frames
    assert np.abs(got - one).max() > 1e-4
    how = ", fused prologue"
    if compiled:
        how = "; prologue apart: not all rungs of this layer fuse them, and a graph has one way"
    for module in runs(pipe):
        assert module == {f"steps 0-0.5: int8+fp16 (reference-lowbit{how})": 2,
                          f"steps 0.5-0.75: int2+fp16 (reference-lowbit{how})": 1,
                          f"steps 0.75-1: exact (reference-exact{how * compiled})": 1}
    assert "exact in some calls, as the recipe says" in coverage(pipe).summary()
    with pytest.raises(ValueError, match="in no step"):
        pipe.transformer.transformer_blocks[0].attn1.processor.attend(*[paddle.randn([1, 4, 2, 32])] * 3)


def transformer(tmp_path):
    model = load(make_random_pipeline(tmp_path), device="cpu").transformer
    config = model.config

    def call(timestep, by_name=True, batch=1):
        latents = paddle.randn([batch, 3, config.in_channels, 4, 6])
        text = paddle.randn([batch, 5, config.text_embed_dim])
        with paddle.no_grad():
            rotary = model.rotary_tables(3, 4, 6)
            if by_name:
                return model(latents, text, timestep=timestep, image_rotary_emb=rotary)
            return model(latents, text, timestep, image_rotary_emb=rotary)

    return model, call


def test_a_bare_model_is_read_by_its_timestep(tmp_path):
    model, call = transformer(tmp_path)
    hooks = [dict(table) for name, table in vars(model).items() if name.startswith("_forward_")]
    handle = apply(model, Recipe(STEPS))
    for timestep, by_name in ((paddle.full([1], 999, dtype="int64"), True), (paddle.to_tensor([501.0]), False), (501, True),
                              (paddle.full([1], 500, dtype="int64"), False), (0.0, True)):
        call(timestep, by_name)
    assert runs(model)[0] == {"steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)": 3,
                              "steps 0.5-1: int8+fp8 (reference-lowbit, fused prologue)": 2}
    with denoising_step(model, 0, 2):
        call(0)  # what is told counts
    assert runs(model)[0]["steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)"] == 4
    with pytest.raises(UnsupportedError, match="timestep 1001, and its schedule has 1000"):
        call(1001)
    with pytest.raises(UnsupportedError, match=r"several timesteps, \[1, 2\]"):
        call(paddle.to_tensor([1, 2]), batch=2)
    with apply(model, Recipe(STEPS)):
        call(3)
    call(3)  # the outer one still looks
    handle.remove()
    assert hooks == [dict(table) for name, table in vars(model).items() if name.startswith("_forward_")]
    assert clock_of(model).users == 0


def test_a_schedule_of_other_timesteps_is_asked(tmp_path):
    pipe = load(make_random_pipeline(tmp_path), device="cpu")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=100)
    apply(pipe, Recipe(STEPS))
    assert clock_of(pipe.transformer)._train == 100


def test_a_copied_model_reads_its_own_timesteps(tmp_path):
    model, call = transformer(tmp_path)
    apply(model, Recipe(STEPS))
    twin = copy.deepcopy(model)
    remove(twin)
    call(999)
    assert runs(model)[0] == {"steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)": 1}
    assert clock_of(twin).users == 0 and clock_of(model).users == 1 and not twin._forward_pre_hooks


def test_ranks_share_heads_of_one_rung_and_refuse_several(framework):
    q, k, v = tensors(framework, tokens=256)
    alone = framework.numpy(processor(*["int8+fp16"] * 4).attend(q, k, v))

    def share(wire, rungs):
        group = Mesh(wire, Degrees(ulysses=2)).ulysses
        cut = slice(128 * group.rank, 128 * group.rank + 128)
        try:
            return framework.numpy(ulysses(processor(*rungs).attend, group)(q[:, cut], k[:, cut], v[:, cut]))
        except UnsupportedError as error:
            return str(error)

    got = run_threads(2, lambda wire: share(wire, ["int8+fp16"] * 4))
    np.testing.assert_allclose(np.concatenate(got, 1), alone, atol=1e-3)
    for refusal in run_threads(2, lambda wire: share(wire, MIXED)):
        assert "several rungs (int8+fp8, int4+fp16), and heads or keys" in refusal
    assert coded(processor("exact").attend) is not None


POOLS = "int8+fp8 pooled 0.5 always 3"


def test_a_rung_with_pooled_keys(framework):
    """Its heads are those of the call that pools, beside others that do not."""
    q, k, v = tensors(framework, tokens=300)
    mixed = processor(POOLS, "int8+fp8", "int8+fp8", POOLS)
    out = framework.numpy(mixed.attend(q, k, v))
    for head in range(4):
        cut, pooled = slice(head, head + 1), Pooled(0.5, 3) if head in (0, 3) else None
        alone = attention(q[:, :, cut], k[:, :, cut], v[:, :, cut], "int8+fp8", pooled=pooled)
        np.testing.assert_array_equal(framework.numpy(alone), out[:, :, cut])
    assert mixed.pools and not processor("int8+fp8").pools and str(processor(POOLS)) == f"RecipeAttnProcessor({POOLS})"


def test_the_report_says_the_share_that_is_kept():
    model = toy_model.model()
    apply(model, Recipe([{"rung": "int8+fp8"}, {"rung": "int8+fp8 pooled 0.5", "heads": "0"}]))
    outputs(model)
    assert list(runs(model)[0]) == [f"heads 0: int8+fp8 pooled 0.5 (reference-lowbit{APART})",
                                    "heads 1: int8+fp8 (reference-lowbit, fused prologue)"]


def test_ranks_share_heads_that_pool_and_a_ring_refuses_them(framework):
    """Of heads a rank has all keys, of a ring a share at a time."""
    q, k, v = tensors(framework, tokens=256)
    alone = framework.numpy(processor(*[POOLS] * 4).attend(q, k, v))

    def share(wire):
        degrees = Mesh(wire, Degrees(ulysses=2)).ulysses
        cut = slice(128 * degrees.rank, 128 * degrees.rank + 128)
        given = q[:, cut], k[:, cut], v[:, cut]
        with pytest.raises(UnsupportedError, match="a ring has a share at a time"):
            ring(processor(*[POOLS] * 4).attend, Group(wire, range(2)))(*given)
        return framework.numpy(ulysses(processor(*[POOLS] * 4).attend, degrees)(*given))

    np.testing.assert_allclose(np.concatenate(run_threads(2, share), 1), alone, atol=1e-3)
