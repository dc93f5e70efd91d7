"""Hooks beside what others do to the same model: offloads, copies, fused projections, casts, adapters, caches, saving."""
import copy
import gc
import types

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

import lowbit_video as lv  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

import diffusers_models  # noqa: E402
from helpers import sqnr_db  # noqa: E402

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


def outputs(model, given):
    with torch.no_grad():
        return model(**copy.deepcopy(given), return_dict=False)[0]


def calls(model):
    return [module.calls for module in lv.coverage(model).modules]


def expected(name, **more):
    """(given, plain, low): what an untouched model of that name computes, and a hooked one. more: of `apply`."""
    model, given = diffusers_models.make(name)
    plain = outputs(model, given)
    lv.apply(model, "int8+fp16", **more)
    return given, plain, outputs(model, given)


def device_map(model, folder):
    parts = {name: "cpu" for name, _ in [*model.named_children(), *model.named_parameters(recurse=False)]}
    del parts["transformer_blocks"]
    parts |= {"transformer_blocks.0": "disk", "transformer_blocks.1": "cpu", "proj_out": "disk"}
    accelerate.dispatch_model(model, parts, main_device=CPU, offload_dir=folder, force_hooks=True)


OFFLOADS = {
    "sequential": lambda model, folder: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "model": lambda model, folder: accelerate.cpu_offload_with_hook(model, CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, CPU, offload_buffers=True),
    "device map": device_map,
    "groups of blocks": lambda model, folder: model.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1),
    "groups of leaves": lambda model, folder: model.enable_group_offload(CPU, CPU, "leaf_level"),
}
"""What `enable_sequential_cpu_offload`, `enable_model_cpu_offload`, ... do to a transformer, with a CPU in the GPU's place."""
NORMS_HOOKED = ("sequential", "disk", "device map", "groups of leaves")


@pytest.mark.parametrize("name, first", [("cogvideox", "hook"), ("cogvideox", "offload"), ("mochi", "offload")])
def test_hooks_work_under_every_offload_in_either_order(name, first, tmp_path):
    """Where a norm's own weights come and go its hooks must run, so norms are computed apart, and the report says it."""
    given, plain, low = expected(name)
    *_, low_apart = expected(name, fused_prologue=False) if name == "cogvideox" else (low,)
    for kind, offload in OFFLOADS.items():
        model, _ = diffusers_models.make(name)
        if first == "hook":
            lv.apply(model, "int8+fp16")
        offload(model, tmp_path / kind)
        if first == "offload":
            lv.apply(model, "int8+fp16")
        got = outputs(model, given)
        apart = all("the LayerNorm has hooks" in variant for variant in lv.coverage(model).variants())
        assert apart == (name == "cogvideox" and kind in NORMS_HOOKED), kind
        assert torch.equal(got, low_apart if apart else low), kind
        assert all(calls(model)) and not lv.coverage(model).fallbacks, kind
        if kind in ("sequential", "disk"):
            assert {p.device.type for p in model.parameters()} == {"meta"}, kind
        assert lv.remove(model) and torch.equal(outputs(model, given), plain), kind


@pytest.mark.parametrize("name", ["cogvideox", "mochi"])
def test_a_copy_has_hooks_and_counts_and_a_way_back_of_its_own(name):
    given, plain, low = expected(name)
    model, _ = diffusers_models.make(name)
    lv.apply(model, None, {"transformer_blocks.0.*": "int8+fp16"})
    lv.apply(model, "int8+fp16")
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, given), low) and all(calls(twin)) and not any(calls(model))
    assert lv.remove(twin) and [module.hooked for module in lv.coverage(twin).modules] == [True, False]
    assert lv.remove(twin) and not lv.remove(twin) and torch.equal(outputs(twin, given), plain)
    assert torch.equal(outputs(model, given), low)
    restored = [module.processor for module in attention_modules(twin).values()]
    del twin
    gc.collect()
    assert lv.remove(model) and lv.remove(model) and torch.equal(outputs(model, given), plain)
    assert all(one is not module.processor for one, module in zip(restored, attention_modules(model).values()))


def test_a_copy_s_errors_name_its_modules_and_a_handle_s_copy_is_the_handle():
    model, given = diffusers_models.make("cogvideox")
    handle = lv.apply(model, "int8+fp16")
    assert copy.deepcopy(handle) is handle
    twin = copy.deepcopy(model)
    given["hidden_states"][0] = float("nan")
    with pytest.raises(lv.NonFiniteError, match="module 'transformer_blocks.0.attn1': q has"):
        outputs(twin, given)


def test_a_saved_model_comes_back_without_hooks_and_the_report_says_so(tmp_path):
    given, plain, _ = expected("mochi")
    model, _ = diffusers_models.make("mochi")
    lv.apply(model, "int8+fp16")
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(back, given), plain) and not lv.remove(back)
    assert lv.coverage(back).summary().startswith("0 of 2") and "not hooked" in str(lv.coverage(back))
    assert all(module.hooked for module in lv.coverage(model).modules)


@pytest.mark.parametrize("name", ["cogvideox", "pixart"])
def test_fused_projections_are_hooked_and_what_fuses_over_hooks_says_in_the_report_that_they_are_gone(name):
    given, plain, _ = expected(name)
    model, _ = diffusers_models.make(name)
    model.fuse_qkv_projections()
    fused = outputs(model, given)
    lv.apply(model, "int8+fp16")
    low = outputs(model, given)
    assert 0 < (low - plain).abs().max() < 0.05 and not lv.coverage(model).fallbacks and all(calls(model))
    assert lv.remove(model) and torch.equal(outputs(model, given), fused)
    lv.apply(model, "int8+fp16")
    model.unfuse_qkv_projections()
    assert torch.equal(outputs(model, given), plain) and not any(module.hooked for module in lv.coverage(model).modules)
    model, _ = diffusers_models.make(name)
    lv.apply(model, "int8+fp16")
    model.fuse_qkv_projections()
    assert torch.equal(outputs(model, given), fused) and not any(module.hooked for module in lv.coverage(model).modules)
    model.unfuse_qkv_projections()
    assert torch.equal(outputs(model, given), low) and all(module.hooked for module in lv.coverage(model).modules)


@pytest.mark.parametrize("name", ["cogvideox", "mochi"])
@pytest.mark.parametrize("first", ["hook", "cast"])
def test_weights_stored_in_float8_are_cast_around_the_hooks(name, first):
    steps = {"cast": lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
             "hook": lambda model: lv.apply(model, "int8+fp16")}
    model, given = diffusers_models.make(name)
    steps["cast"](model)
    plain = outputs(model, given)
    if first == "hook":
        model, given = diffusers_models.make(name)
    for step in ("hook", "cast") if first == "hook" else ("hook",):
        steps[step](model)
    assert 0 < (outputs(model, given) - plain).abs().max() < 0.05 and all(calls(model))
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert lv.remove(model) and torch.equal(outputs(model, given), plain)


@pytest.mark.parametrize("name", ["cogvideox", "mochi", "sd3"])
def test_a_lora_adapter_is_served_before_and_after_the_hooks_and_unloaded_under_them(name):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])

    def adapt(model):
        torch.manual_seed(1)
        model.add_adapter(config)

    given, plain, low = expected(name)
    model, _ = diffusers_models.make(name)
    adapt(model)
    adapted = outputs(model, given)
    lv.apply(model, "int8+fp16")
    both = outputs(model, given)
    assert 0 < (both - adapted).abs().max() < 0.05 < (adapted - plain).abs().max()
    assert lv.remove(model) and torch.equal(outputs(model, given), adapted)
    model, _ = diffusers_models.make(name)
    lv.apply(model, "int8+fp16")
    adapt(model)
    assert torch.equal(outputs(model, given), both) and all(module.hooked for module in lv.coverage(model).modules)
    model.unload_lora()
    assert torch.equal(outputs(model, given), low)
    assert lv.remove(model) and torch.equal(outputs(model, given), plain)


def test_an_adapter_in_a_model_whose_weights_are_stored_in_float8_is_served():
    """A combination that peft's and diffusers' users reported to fail by the adapter's dtype."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, given = diffusers_models.make("cogvideox")
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    plain = outputs(model, given)
    lv.apply(model, "int8+fp16")
    assert 0 < (outputs(model, given) - plain).abs().max() < 0.05 and all(calls(model))
    assert lv.remove(model) and torch.equal(outputs(model, given), plain)


def test_an_offload_may_be_taken_off_and_another_put_on_under_the_hooks(tmp_path):
    given, plain, low = expected("mochi")
    model, _ = diffusers_models.make("mochi")
    lv.apply(model, "int8+fp16")
    for kind in ("sequential", "model", "disk"):
        OFFLOADS[kind](model, tmp_path / kind)
        assert torch.equal(outputs(model, given), low), kind
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(outputs(model, given), low) and calls(model) == [8, 8]  # two samples, four times
    assert lv.remove(model) and torch.equal(outputs(model, given), plain)


@pytest.mark.parametrize("name", ["cogvideox", "mochi", "allegro"])
def test_pyramid_attention_broadcast_skips_hooked_attention_and_the_report_counts_what_ran(name):
    given, plain, low = expected(name)
    model, _ = diffusers_models.make(name)
    lv.apply(model, "int8+fp16")
    once = calls_of_a_forward(model, given)
    model.enable_cache(diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500,
        spatial_attention_timestep_skip_range=(100, 800), cross_attention_timestep_skip_range=(100, 800)))
    for _ in range(4):
        assert torch.equal(outputs(model, given), low)  # the same input, so what is kept is what would be computed
    assert calls(model) == [3 * count for count in once]
    model.disable_cache()
    assert lv.remove(model) and torch.equal(outputs(model, given), plain)


def test_faster_cache_skips_hooked_attention():
    results = []
    for hooked in (False, True):
        model, given = diffusers_models.make("cogvideox")
        if hooked:
            lv.apply(model, "int8+fp16")
        now = [900]
        model.enable_cache(diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2, tensor_format="BFCHW", attention_weight_callback=lambda module: 0.5,
            current_timestep_callback=lambda now=now: now[0]))
        results.append([])
        for now[0] in (900, 900, 600, 580, 560, 540):
            results[-1].append(outputs(model, given))
    plain, low = (torch.stack(one) for one in results)
    assert 30 < sqnr_db(low, plain) < 100 and 0 < max(calls(model)) < 6
    model.disable_cache()
    assert lv.remove(model)


def calls_of_a_forward(model, given):
    before = calls(model)
    outputs(model, given)
    return [after - count for after, count in zip(calls(model), before)]


def test_diffusers_own_context_parallelism_without_our_plan_is_refused_with_what_to_call(monkeypatch):
    model, _ = diffusers_models.make("cogvideox")
    config = types.SimpleNamespace(context_parallel_config=object(), tensor_parallel_config=None)
    monkeypatch.setattr(type(model), "_resolve_parallel_config", lambda self, given: config)  # that needs several ranks
    with lv.apply(model, "int8+fp16"):
        with pytest.raises(lv.UnsupportedError, match=r"lowbit_video.parallelize\(pipe\) in its place.*lowbit_video.cp_plan"):
            model.enable_parallelism(config=config, cp_plan={})
        model._parallel_config = config
        for late in (lambda: lv.apply(model, "int8+fp16"), lambda: lv.remove(model)):
            with pytest.raises(lv.UnsupportedError, match="apply first, then"):
                late()
        model._parallel_config = None
