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
