"""The attention that benchmarks compare with: how FlashAttention-4 is called, and why it is left out where it is."""
import importlib.machinery
import re
import sys
import types

import numpy as np
import pytest

from lowbit_video.eval.speed import bench
from lowbit_video.eval.speed.baselines import BASELINES

from helpers import naive_attention, qkv

FLASH_4 = next(baseline for baseline in BASELINES if baseline.name == "FlashAttention-4")


class Tensor:
    """An array with PyTorch's names for what the call uses."""

    def __init__(self, array, dense=True):
        self.array, self.dense, self.shape = array, dense, array.shape

    def transpose(self, i, j):
        return Tensor(self.array.swapaxes(i, j), dense=False)

    def contiguous(self):
        return Tensor(self.array)


@pytest.fixture
def machine(monkeypatch):
    """Sets PyTorch's GPU (None: it sees none) and what `flash_attn` holds (None: there is no such package)."""
    def set_up(capability=(9, 0), flash_attn=None):
        cuda = types.SimpleNamespace(is_available=lambda: capability is not None, get_device_capability=lambda: capability)
        torch = types.ModuleType("torch")
        torch.cuda, torch.__spec__ = cuda, importlib.machinery.ModuleSpec("torch", None)
        monkeypatch.setitem(sys.modules, "torch", torch)
        package = None
        if flash_attn is not None:
            package = types.ModuleType("flash_attn")
            package.__path__ = []
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        if flash_attn:
            package.cute = types.ModuleType("flash_attn.cute")
            package.cute.flash_attn_func = flash_attn
            monkeypatch.setitem(sys.modules, "flash_attn.cute", package.cute)
        else:
            monkeypatch.delitem(sys.modules, "flash_attn.cute", raising=False)

    return set_up


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_4_gets_dense_tokens_before_heads_and_gives_them_back_after(machine, causal):
    given = []

    def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False):
        given.append((q, k, v))
        assert qv is gather_kv_indices is softmax_scale is None
        return Tensor(naive_attention(q.array, k.array, v.array, causal=causal)[0]), None

    machine(flash_attn=flash_attn_func)
    assert FLASH_4.why_not() is None and FLASH_4.framework == "torch"
    arrays = qkv(2, 3, q_len=33, dim=16)
    want = naive_attention(*arrays, causal=causal)[0].swapaxes(1, 2)
    call = FLASH_4.make(*(Tensor(array.swapaxes(1, 2)) for array in arrays), causal)
    for _ in range(2):
        np.testing.assert_allclose(call().array, want, atol=1e-6)
    assert all(x.dense and x.shape == (2, 33, 3, 16) for tensors in given for x in tensors)
    assert given[0][0] is given[1][0]  # the copies are made once, outside of what is timed


@pytest.mark.parametrize("capability, flash_attn, reason", [
    (None, print, "PyTorch has no GPU"),
    ((9, 0), None, "flash-attn-4 is not installed"),
    ((9, 0), False, "flash-attn-4 is not installed .*flash_attn.cute"),  # FlashAttention-2 alone
    ((7, 5), print, "sm_80 to sm_12x, this GPU is sm_75"),
    ((13, 0), print, "this GPU is sm_130"),
])
def test_flash_attention_4_says_why_it_is_left_out(machine, capability, flash_attn, reason):
    machine(capability, flash_attn)
    assert re.search(reason, FLASH_4.why_not())


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_flash_attention_4_runs_where_its_source_says(machine, capability):
    machine(capability, print)
    assert FLASH_4.why_not() is None


def test_versions_of_what_ran_are_recorded_by_the_distribution_that_has_it(monkeypatch):
    there = {"numpy": "2.5.5", "paddlepaddle": "3.3.1", "flash-attn-4": "4.0.0b36"}

    def version(name):
        if name not in there:
            raise bench.importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(bench.importlib.metadata, "version", version)
    assert bench.package_versions() == {"numpy": "2.5.5", "paddle": "3.3.1", "flash-attn-4": "4.0.0b36"}
    there["paddlepaddle-gpu"] = "3.3.0"
    assert bench.package_versions()["paddle"] == "3.3.0"
