"""diffusers' hooked models on a GPU: kernels run in their attention, also while weights come and go between host and GPU."""
import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

import lowbit_video as lv  # noqa: E402

import diffusers_models  # noqa: E402
from helpers import sqnr_db  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::lowbit_video.errors.SlowerThanExactWarning")]
FLOOR_DB = 30


@pytest.fixture
def device(gpu):
    if gpu.name != "torch":
        pytest.skip("needs PyTorch on the GPU; LOWBIT_TEST_FRAMEWORK names another framework")
    return gpu.like.device


def moved(value, device, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device, dtype) for one in value)
    return {key: moved(one, device, dtype) for key, one in value.items()} if isinstance(value, dict) else value


def make(name, device, dtype=torch.float32):
    model, given = diffusers_models.make(name)
    return model.to(dtype), moved(given, device, dtype)


def outputs(model, given):
    with torch.no_grad():
        return model(**copy.deepcopy(given), return_dict=False)[0]


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in diffusers_models.MODELS if name != "omnigen"),
                                         ("cogvideox", torch.bfloat16), ("mochi", torch.bfloat16)])
def test_kernels_run_in_every_attention_module(device, name, dtype):
    model, given = make(name, device, dtype)
    model.to(device)
    plain = outputs(model, given)
    lv.apply(model, "int8+fp16")
    low = outputs(model, given)
    report = lv.coverage(model)
    assert all(module.calls for module in report.modules)
    assert all("triton" in variant or "hopper" in variant for variant in report.variants())
    assert low.isfinite().all() and sqnr_db(low.float().cpu(), plain.float().cpu()) > FLOOR_DB
    assert lv.remove(model) and torch.equal(outputs(model, given), plain)


@pytest.mark.parametrize("name", ["cogvideox", "mochi"])
@pytest.mark.parametrize("kind", ["sequential", "model", "groups of blocks", "groups of leaves", "groups, streamed"])
def test_hooks_work_while_weights_come_and_go(device, name, kind):
    """Where a norm's own weights come and go its hooks must run, so norms are computed apart, and the report says it."""
    host = torch.device("cpu")
    apart = name == "cogvideox" and kind not in ("model", "groups of blocks")
    model, given = make(name, device)
    lv.apply(model.to(device), "int8+fp16", fused_prologue=False if apart else None)
    low = outputs(model, given)
    model, given = make(name, device)
    lv.apply(model, "int8+fp16")
    {"sequential": lambda: accelerate.cpu_offload(model, device, offload_buffers=True),
     "model": lambda: accelerate.cpu_offload_with_hook(model, device),
     "groups of blocks": lambda: model.enable_group_offload(device, host, "block_level", num_blocks_per_group=1),
     "groups of leaves": lambda: model.enable_group_offload(device, host, "leaf_level"),
     "groups, streamed": lambda: model.enable_group_offload(device, host, "leaf_level", use_stream=True)}[kind]()
    for _ in range(3):
        assert torch.equal(outputs(model, given), low)
    assert all(module.calls for module in lv.coverage(model).modules)
    assert all(("the LayerNorm has hooks" in variant) == apart for variant in lv.coverage(model).variants())
