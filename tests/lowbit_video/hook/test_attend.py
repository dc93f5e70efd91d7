"""Exact attention goes to the Hopper kernel where that is faster than the framework's own, else to the framework.

The kernel is run by `gluon_in_numpy`; the framework is played by NumPy, whose arrays stand for an H100's tensors.
"""
import contextlib
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")

from lowbit_video import ExactAttnProcessor, LowBitAttnProcessor  # noqa: E402
from lowbit_video.engine import replay  # noqa: E402
from lowbit_video.hook import attend, processors  # noqa: E402
from lowbit_video.kernels.attention.hopper import launch  # noqa: E402
from lowbit_video.runtime import detect  # noqa: E402

from gluon_in_numpy import Memory  # noqa: E402
from helpers import naive_attention  # noqa: E402

LIMITS = {"float16": (1e-3, 4e-3), "bfloat16": (6e-3, 2e-2)}
"""Relative L1 of all rows together and of each: P and the output are rounded, as by the frameworks' own kernels."""


class Tensor(np.ndarray):
    """An array that says where it lies."""

    def data_ptr(self):
        return self.ctypes.data


class NoMemory(Tensor):
    """What a transform of a framework makes of a tensor."""

    def data_ptr(self):
        raise RuntimeError("no memory to point at")


@pytest.fixture
def gpu(monkeypatch):
    """A runtime of arrays on an H100, the exact Hopper kernel being taken; launched: grids, own: calls of the framework."""
    memory, launched, own = Memory(), [], []
    kernel = memory.kernel()

    def tensor(array, dtype):
        x = np.ascontiguousarray(array).astype(getattr(ml_dtypes, dtype, dtype)).view(Tensor)
        memory.buffer(x)
        return x

    def exact_attention(q, k, v, **choices):
        own.append(choices)
        return q

    class Kernel:
        arg_names = kernel.arg_names

        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    runtime = SimpleNamespace(
        NAME="numpy", dtype_name=lambda t: t.dtype.name, shape=lambda t: t.shape, place=lambda t: "gpu:0",
        is_cpu=lambda t: False, strides=lambda t: tuple(s // t.itemsize for s in t.strides), arch=lambda t: (9, 0),
        stream=lambda t: 0, signature=lambda t: (t.shape, t.dtype), contiguous=lambda t: t, unreadable=lambda t: None,
        launch_guard=lambda t: contextlib.nullcontext(), wants_gradients=lambda *tensors: False,
        empty=lambda shape, dtype, like: tensor(np.full(shape, np.nan, np.float32), dtype), exact_attention=exact_attention)
    for module in (attend, processors):
        monkeypatch.setattr(module, "runtime_of", lambda t: runtime)
    monkeypatch.setattr(detect, "same_runtime", lambda **tensors: runtime)
    monkeypatch.setattr(launch, "attn_fwd_kernel", Kernel())
    monkeypatch.setitem(vars(attend.FASTER), "automatic", True)
    monkeypatch.setattr(attend, "FASTER_FROM", 140)
    monkeypatch.setenv(replay.ENVIRONMENT, "0")
    return SimpleNamespace(tensor=tensor, runtime=runtime, launched=launched, own=own)


def drawn(gpu, dtype="float16", q_len=70, kv_len=140, heads=2, kv_heads=1, head_dim=64):
    rng = np.random.default_rng(head_dim)
    return [gpu.tensor(rng.standard_normal((1, tokens, n, head_dim), np.float32), dtype)
            for tokens, n in ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))]


@pytest.mark.parametrize("dtype, head_dim, causal, scale", [
    ("float16", 64, False, None), ("float16", 128, True, None), ("bfloat16", 64, True, 0.3), ("bfloat16", 128, False, 0.3)])
@pytest.mark.parametrize("lse", [False, True], ids=["", "lse"])
def test_what_the_kernel_serves_it_computes_as_well_as_the_framework(gpu, dtype, head_dim, causal, scale, lse):
    q, k, v = drawn(gpu, dtype, 140, head_dim=head_dim)
    got = attend.exact_attend(q, k, v, causal, scale, lse)
    out, got_lse = got if lse else (got, None)
    wanted, wanted_lse = naive_attention(q, k, v, scale, causal)
    assert len(gpu.launched) == 1 and not gpu.own and out.shape == q.shape and out.dtype == q.dtype
    error, size = np.abs(out.astype(np.float64) - wanted).sum(-1), np.abs(wanted).sum(-1)
    limit, row_limit = LIMITS[dtype]
    assert error.sum() <= limit * size.sum() and (error <= row_limit * size).all(), (error.sum() / size.sum())
    if lse:
        np.testing.assert_allclose(got_lse, wanted_lse, atol=2e-3)


@pytest.mark.parametrize("processor", [ExactAttnProcessor(), LowBitAttnProcessor("int8+fp8", fallback="exact")], ids=str)
def test_processors_take_it(gpu, processor):
    """The second because so few tokens are faster so."""
    q, k, v = drawn(gpu)
    np.testing.assert_array_equal(processor.attend(q, k, v, scale=0.2), attend.exact_attend(q, k, v, scale=0.2))
    assert len(gpu.launched) == 2 and not gpu.own


CHANGES = {
    "waits": lambda gpu, patch: patch.setitem(vars(attend.FASTER), "automatic", False),
    "gradients": lambda gpu, patch: setattr(gpu.runtime, "wants_gradients", lambda *tensors: True),
    "torch.compile": lambda gpu, patch: patch.setattr(attend, "traced_by_torch", lambda q: True),
    "to_static": lambda gpu, patch: patch.setattr(attend, "traced_by_paddle", lambda q: True),
    "few keys": lambda gpu, patch: patch.setattr(attend, "FASTER_FROM", 141),
    "a CPU": lambda gpu, patch: setattr(gpu.runtime, "is_cpu", lambda t: True),
    "sm_80": lambda gpu, patch: setattr(gpu.runtime, "arch", lambda t: (8, 0)),
    "sm_100": lambda gpu, patch: setattr(gpu.runtime, "arch", lambda t: (10, 0)),
    "no CUDA": lambda gpu, patch: setattr(gpu.runtime, "arch", lambda t: None),
    "unreadable": lambda gpu, patch: setattr(gpu.runtime, "unreadable", lambda t: "a sparse tensor"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_frameworks_own_attention_computes_where_the_kernel_may_not(gpu, monkeypatch, change):
    CHANGES[change](gpu, monkeypatch)
    q, k, v = drawn(gpu)
    assert attend.exact_attend(q, k, v, scale=0.3) is q
    assert gpu.own == [dict(is_causal=False, scale=0.3)] and not gpu.launched


@pytest.mark.parametrize("case", ["float32", "head dim", "negative scale", "scale on the device", "address", "other values",
                                  "no memory"])
def test_and_what_the_kernel_does_not_serve(gpu, case):
    q, k, v = drawn(gpu, "float32" if case == "float32" else "float16", 140, head_dim=96 if case == "head dim" else 64)
    scale = {"negative scale": -0.3, "scale on the device": gpu.tensor([0.3], "float32")}.get(case, 0.3)
    if case == "address":
        k = gpu.tensor(np.zeros(k.size + 8), "float16")[1:k.size + 1].reshape(k.shape)
    elif case == "other values":
        v = v[..., :32]
    elif case == "no memory":
        q = q.view(NoMemory)
    assert attend.exact_attend(q, k, v, True, scale) is q
    [choices] = gpu.own
    assert choices["is_causal"] is True and choices["scale"] is scale and not gpu.launched
