"""diffusers' dispatcher on a real GPU: our kernels serve it, short keys are exact, and the host waits for a mask once."""
import pytest

pytestmark = pytest.mark.gpu
LONG, SHORT = 16384, 512
"""Keys: more than any kernel needs to be faster than exact attention, and a cross attention's."""
INT8 = "lowbit_int8_fp16"


@pytest.fixture(scope="module")
def call(gpu):
    """call(q, k, v, mask=None, backend=INT8), by diffusers' dispatcher."""
    if gpu.name != "torch":
        pytest.skip("diffusers' tensors are PyTorch's; set LOWBIT_TEST_FRAMEWORK=torch")
    pytest.importorskip("diffusers", reason="needs diffusers")
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    from lowbit_video import register_diffusers, unregister_diffusers

    register_diffusers()

    def call(q, k, v, mask=None, backend=INT8):
        return dispatch_attention_fn(q, k, v, mask, backend=AttentionBackendName(backend))

    yield call
    unregister_diffusers()


def tensors(keys, batch=1):
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(batch, tokens, 2, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
            for tokens in (1000, keys, keys)]


def sqnr_db(value, wanted):
    return (wanted.float().square().sum() / (value - wanted).float().square().sum()).log10().item() * 10


def test_many_keys_are_served_by_a_kernel_and_few_exactly(call):
    import torch

    q, k, v = tensors(LONG)
    low, exact = call(q, k, v), call(q, k, v, backend="native")
    assert 20 < sqnr_db(low, exact) < 60 and torch.equal(call(q, k, v, backend=INT8 + "_strict"), low)
    q, k, v = tensors(SHORT)
    assert torch.equal(call(q, k, v), call(q, k, v, backend="native"))
    assert not torch.equal(call(q, k, v, backend=INT8 + "_strict"), call(q, k, v))


def test_the_host_waits_for_a_mask_once_and_for_nothing_else(call):
    import torch

    q, k, v = tensors(LONG, batch=2)
    mask = (torch.arange(LONG, device="cuda") < torch.tensor([[9000], [LONG]], device="cuda"))[:, None, None]
    first, whole = call(q, k, v, mask), call(q, k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, unmasked = call(q, k, v, mask), call(q, k, v)
        with pytest.raises(RuntimeError, match="synchroniz"):
            call(q, k, v, mask.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first) and torch.equal(unmasked, whole)
    assert sqnr_db(first, call(q, k, v, mask, backend="native")) > 20 and sqnr_db(first[:1], whole[:1]) < 20


def test_a_compiled_call_is_the_eager_one(call):
    import torch

    q, k, v = tensors(LONG, batch=2)
    mask = (torch.arange(LONG, device="cuda") < torch.tensor([[9000], [LONG]], device="cuda"))[:, None, None]
    compiled = torch.compile(call, fullgraph=True)
    for given in (None, mask):
        assert torch.equal(compiled(q, k, v, given), call(q, k, v, given))


def test_a_recipe_serves_each_head_by_its_rung(call):
    from lowbit_video.hook.dispatcher.recipe import RecipeAttention
    from lowbit_video.hook.recipe.clock import StepClock
    from lowbit_video.hook.recipe.table import LayerPlan, Span
    from lowbit_video.hook.report import Record

    class Caller:
        record = Record("here")

    q, k, v = tensors(LONG)
    attention = RecipeAttention(LayerPlan((Span(0.0, 1.0, ("int8+fp16", "exact")),)), StepClock(), {"fallback": None})
    for _ in range(2):  # recorded, then replayed
        out, _ = attention.serve(Caller, q, k, v, None, None, False, None, False)
        for head, backend in enumerate((INT8 + "_strict", "native")):
            alone = call(*(t[:, :, head:head + 1].contiguous() for t in (q, k, v)), backend=backend)
            assert sqnr_db(out[:, :, head:head + 1], alone) > 60
    assert [calls for calls in Caller.record.calls.values()] == [2, 2]


def test_a_models_steps_run_by_a_recipe_eager_and_compiled(call):
    import torch

    from dispatch_models import make, predict
    from lowbit_video import Recipe, apply, coverage, remove

    model, inputs = make("wan")
    model = model.to("cuda", torch.bfloat16)
    inputs = {name: t.to("cuda", torch.bfloat16 if t.is_floating_point() else t.dtype) for name, t in inputs.items()}
    at = lambda timestep: {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}
    exact = predict(model, at(100))
    apply(model, Recipe([{"rung": "int8+fp16"}, {"steps": "0-0.5", "rung": "exact"}, {"layers": "*.attn2", "rung": "exact"}]))
    predict(model, at(900))
    eager = predict(model, at(100))
    ran = {module.name: [(what.partition(" (")[0], calls) for what, calls, _ in module.runs]
           for module in coverage(model).modules}
    assert ran["blocks.0.attn1"] == [("steps 0-0.5: exact", 1), ("steps 0.5-1: int8+fp16", 1)]
    assert ran["blocks.1.attn2"] == [("exact", 2)] and "reference" not in str(coverage(model))
    model.compile_repeated_blocks(fullgraph=True)
    compiled = predict(model, at(100))
    remove(model)
    assert sqnr_db(eager, exact) > 20 and sqnr_db(compiled, eager) > 20 and not torch.equal(eager, exact)
