"""torch tensors: a `protocol.Runtime`."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from . import cuda_driver, placing, triton_driver

NAME = "torch"
_NAMES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "int8", "uint8", "int32", "float8_e4m3fn")}


def unreadable(t: torch.Tensor) -> str | None:
    """Why no kernel can read it: "a nested tensor", "a torch.sparse_coo tensor", "on meta", ...; None where one can."""
    if t.is_nested or t.is_quantized:
        return f"a {'nested' if t.is_nested else 'quantised'} tensor"
    if t.layout != torch.strided:
        return f"a {t.layout} tensor"
    return None if t.device.type in ("cpu", "cuda") else f"on {t.device}"


def dtype_name(t: torch.Tensor) -> str:
    """"float16", "bfloat16", "float32", ..."""
    return _NAMES.get(t.dtype) or str(t.dtype).rpartition(".")[2]


def shape(t: torch.Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def strides(t: torch.Tensor) -> tuple[int, ...]:
    """In elements."""
    return tuple(t.stride())


def signature(t: torch.Tensor) -> tuple | None:
    """Shape, strides, dtype and device, to tell tensors apart quickly; None on a CPU."""
    return (t.shape, t.stride(), t.dtype, t.get_device()) if t.is_cuda else None


def place(t: torch.Tensor) -> str:
    """The device that holds the tensor, in words."""
    return str(t.device)


def is_cpu(t: torch.Tensor) -> bool:
    return t.device.type == "cpu"


def arch(t: torch.Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU that holds the tensor; None on a CPU."""
    return capability(t.device.index) if t.is_cuda else None


def processors(t: torch.Tensor) -> int | None:
    """Multiprocessors of the GPU that holds the tensor; None on a CPU."""
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else None


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of the CUDA device of that index."""
    return torch.cuda.get_device_capability(index)


def memory_gib(t: torch.Tensor) -> float | None:
    """The whole memory of the GPU that holds the tensor, in GiB; None on a CPU."""
    return torch.cuda.get_device_properties(t.device).total_memory / 2**30 if t.is_cuda else None


def stream(t: torch.Tensor) -> int:
    """Handle of torch's current stream on the tensor's device."""
    return torch._C._cuda_getCurrentRawStream(t.get_device())


def wants_gradients(*tensors: torch.Tensor) -> bool:
    """Whether what is computed of the tensors now would be differentiated."""
    if torch.is_grad_enabled():
        for t in tensors:  # no generator: this is asked at every call
            if t.requires_grad:
                return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous()


def empty(shape: Sequence[int], dtype: str, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised, contiguous, where `like` is."""
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=like.device)


def to_numpy(t: torch.Tensor) -> np.ndarray:
    """A NumPy array; 16-bit floats become float32."""
    t = t.detach()
    if t.dtype in (torch.float16, torch.bfloat16):
        t = t.float()
    return t.cpu().numpy()


def from_numpy(array: np.ndarray, like: torch.Tensor, dtype: str) -> torch.Tensor:
    """A tensor of that dtype where `like` is; the values are cast."""
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).to(like.device).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=like.device, dtype=getattr(torch, dtype))


def permute(t: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    return t.permute(tuple(axes))


def view(t: torch.Tensor, dtype: str) -> torch.Tensor:
    """The memory of a contiguous tensor read as another dtype, along its last dimension; no copy."""
    return t.view(getattr(torch, dtype))


def concat(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return torch.cat(list(tensors), axis)


def cut(t: torch.Tensor, at: int, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    return t.narrow(axis, 0, at), t.narrow(axis, at, t.shape[axis] - at)


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool = False,
                    scale: float | None = None) -> torch.Tensor:
    """torch's own attention, [B, N, H, D] in and out."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """torch's own attention under a mask that broadcasts to [B, H, Nq, Nkv] (bool: True attends; else added)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@functools.cache
def _place(index: int) -> object:
    return placing.place(index, lambda: torch._C._cuda_getCurrentRawStream(index))


@contextlib.contextmanager
def launch_guard(t: torch.Tensor):
    """Makes the tensor's device current, for the driver too; Triton's own driver asks torch for the stream."""
    if not t.is_cuda:
        yield
        return
    index = t.device.index
    place = _place(index)
    with triton_driver.default(), cuda_driver.current(index) if place is None else placing.on(place):
        if torch.cuda.current_device() == index:
            yield
        else:
            with torch.cuda.device(t.device):
                yield


def anchor(device: str = "auto") -> torch.Tensor:
    """A small float32 tensor on a device ("auto", "cpu", "cuda:0"), to stand for that place."""
    return torch.zeros(64, device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
