"""What the runtime of torch tensors answers where another answer would be found out late: on a GPU, or by another's numbers."""
import contextlib
import types

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
import torch.nn.functional as F  # noqa: E402

from lowbit_video.runtime import torch_runtime  # noqa: E402

pytestmark = pytest.mark.torch


def on_a_gpu(**changed):
    """Stands for a tensor on the second GPU."""
    parts = dict(is_cuda=True, shape=(2, 3), dtype=torch.float16, stride=lambda: (3, 1), get_device=lambda: 1)
    return types.SimpleNamespace(**{**parts, **changed})


def test_tensors_that_a_launch_tells_apart_have_signatures_of_their_own():
    others = (on_a_gpu(shape=(3, 2)), on_a_gpu(dtype=torch.bfloat16), on_a_gpu(stride=lambda: (1, 2)),
              on_a_gpu(get_device=lambda: 0))
    assert torch_runtime.signature(on_a_gpu()) == torch_runtime.signature(on_a_gpu())
    assert len({torch_runtime.signature(t) for t in (on_a_gpu(), *others)}) == 5
    assert torch_runtime.signature(torch.ones(2)) is None


def test_the_stream_is_that_of_the_tensors_device(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    assert torch_runtime.stream(on_a_gpu()) == 101


def test_what_no_kernel_reads_is_told_apart():
    x = torch.ones(2, 4)
    odd = {"a nested tensor": torch.nested.nested_tensor([x[0], x[1, :3]]), "a torch.sparse_coo tensor": x.to_sparse(),
           "a quantised tensor": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "on meta": x.to("meta")}
    assert {torch_runtime.unreadable(t): t for t in odd.values()} == {words: t for words, t in odd.items()}
    assert torch_runtime.unreadable(x.T) is None


def test_float8_comes_from_numpy_bit_by_bit():
    array = np.array([0.5, -448.0, 0.0], ml_dtypes.float8_e4m3fn)
    back = torch_runtime.from_numpy(array, torch.ones(1), "float8_e4m3fn")
    assert back.dtype == torch.float8_e4m3fn and back.float().tolist() == [0.5, -448.0, 0.0]


@pytest.mark.parametrize("placed", [False, True])
def test_torchs_own_triton_waits_while_a_launch_goes_through_ours(monkeypatch, placed):
    entered = []
    note = lambda what: contextlib.nullcontext(entered.append(what))
    monkeypatch.setattr(torch_runtime.triton_driver, "default", lambda: note("default"))
    monkeypatch.setattr(torch_runtime.cuda_driver, "current", lambda index: note(index))
    monkeypatch.setattr(torch_runtime.placing, "on", note)
    monkeypatch.setattr(torch_runtime, "_place", lambda index: "place" if placed else None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with torch_runtime.launch_guard(on_a_gpu(device=types.SimpleNamespace(index=1))):
        assert entered == ["default", "place" if placed else 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float32", "float16"])
def test_masks_of_every_type_are_torchs_own_attention(kind, dtype):
    q, k, v = torch.randn(3, 1, 6, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.tensor([True, False, True, True, False, True]).expand(1, 1, 6, 6)
    mask = mask if kind == "bool" else torch.zeros(mask.shape, dtype=getattr(torch, kind)).masked_fill(~mask, -1e4)
    by_heads = [x.transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*by_heads, mask if kind == "bool" else mask.to(dtype))
    assert torch.equal(torch_runtime.masked_attention(q, k, v, mask), wanted.transpose(1, 2))
    assert (wanted - F.scaled_dot_product_attention(*by_heads)).abs().max() > 0.05


def test_exact_attention_shares_heads_scales_and_hides():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 6, 4, 16, generator=generator), torch.randn(1, 6, 2, 16, generator=generator)
    out = torch_runtime.exact_attention(q, k, k, is_causal=True, scale=0.7)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 0.7
    weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, k.repeat_interleave(2, 2)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_go_to_numpy_and_back_whoever_wants_their_gradients(dtype):
    t = torch.tensor([[0.5, -3.0], [7.0, 0.0]], dtype=getattr(torch, dtype), requires_grad=True)
    array = torch_runtime.to_numpy(t)
    assert array.dtype == np.float32
    back = torch_runtime.from_numpy(array.T[::-1], t, dtype)
    assert back.dtype == t.dtype and back.is_contiguous() and back.tolist() == [[-3.0, 0.0], [0.5, 7.0]]
