"""Paddle tensors: where they are, what they hold, and how a kernel gets at them; a `protocol.Runtime`."""
from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import _C_ops

from lowbit_video.kernels.shipped.choice import chosen

from . import cuda_driver, placing, triton_driver

NAME = "paddle"
_DTYPES = {"float16": paddle.float16, "bfloat16": paddle.bfloat16, "float32": paddle.float32, "float64": paddle.float64,
           "int8": paddle.int8, "uint8": paddle.uint8, "int32": paddle.int32, "float8_e4m3fn": paddle.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def unreadable(t: paddle.Tensor) -> str | None:
    """Why no kernel can read it: "a sparse tensor" or "without memory"; None where one can."""
    if not isinstance(t, paddle.Tensor):
        return None
    if t.is_sparse():
        return "a sparse tensor"
    return "without memory" if t.size and not t._is_initialized() else None


def dtype_name(t: paddle.Tensor) -> str:
    """"float16", "bfloat16", "float32", ..."""
    return _NAMES.get(t.dtype) or str(t.dtype).rpartition(".")[2]


def shape(t: paddle.Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def strides(t: paddle.Tensor) -> tuple[int, ...]:
    """In elements."""
    return tuple(t.get_strides())


def signature(t: paddle.Tensor) -> tuple | None:
    """Shape, strides, dtype and device, to tell tensors apart quickly; None on a CPU and in a program being traced."""
    if not isinstance(t, paddle.Tensor):
        return None
    ordinal = device_index(t)
    return (tuple(t.shape), tuple(t.get_strides()), t.dtype, ordinal) if ordinal >= 0 else None


def place(t: paddle.Tensor) -> str:
    """The device that holds the tensor, in words."""
    return str(t.place)


def is_cpu(t: paddle.Tensor) -> bool:
    return t.place.is_cpu_place()


def arch(t: paddle.Tensor) -> tuple[int, int] | None:
    """Compute capability of the GPU that holds the tensor; None on a CPU."""
    return None if is_cpu(t) else cuda_driver.capability(device_index(t))


def processors(t: paddle.Tensor) -> int | None:
    """Multiprocessors of the GPU that holds the tensor; None on a CPU."""
    return None if is_cpu(t) else cuda_driver.multiprocessors(device_index(t))


def memory_gib(t: paddle.Tensor) -> float | None:
    """The whole memory of the GPU that holds the tensor, in GiB; None on a CPU."""
    return None if is_cpu(t) else cuda_driver.memory_gib(device_index(t))


def device_index(t: paddle.Tensor) -> int:
    """The CUDA ordinal of the device that holds the tensor; -1 on a CPU."""
    place = t.place
    if place.is_gpu_place():
        return place.gpu_device_id()
    if place.is_custom_place():
        return place.custom_device_id()
    return -1


def stream(t: paddle.Tensor) -> int:
    """Handle of Paddle's current stream on the tensor's device."""
    return _raw_stream(device_index(t))


def _raw_stream(ordinal: int) -> int:
    from paddle._C import _cuda_getCurrentRawStream

    return _cuda_getCurrentRawStream(ordinal)


def wants_gradients(*tensors: paddle.Tensor) -> bool:
    """Whether what is computed of the tensors now would be differentiated."""
    for t in tensors:  # no generator: this is asked at every call
        if not t.stop_gradient:
            return paddle.is_grad_enabled()
    return False


def contiguous(t: paddle.Tensor) -> paddle.Tensor:
    return t.contiguous()


def empty(shape: Sequence[int], dtype: str, like: paddle.Tensor) -> paddle.Tensor:
    """Uninitialised, contiguous, where `like` is."""
    if dtype == "float8_e4m3fn":  # custom devices allocate bytes, not FP8
        return empty(shape, "uint8", like).view(paddle.float8_e4m3fn)
    if paddle.in_dynamic_mode():  # what `paddle.empty` comes to, in a third of its time
        return _C_ops.empty(list(shape), _DTYPES[dtype], like.place)
    return paddle.empty(list(shape), dtype=_DTYPES[dtype], device=like.place)


def to_numpy(t: paddle.Tensor) -> np.ndarray:
    """A NumPy array; 16-bit floats become float32."""
    if dtype_name(t) in ("float16", "bfloat16"):
        t = t.astype("float32")
    return t.numpy()


def from_numpy(array: np.ndarray, like: paddle.Tensor, dtype: str) -> paddle.Tensor:
    """A tensor of that dtype where `like` is; the values are cast."""
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return paddle.to_tensor(array.view(np.uint8), place=like.place).view(paddle.float8_e4m3fn)
    if dtype == "float16":  # on a CPU Paddle 3.3.1 makes up to 1e-4 of 5e-27 to 7e-24
        array = array.astype(np.float16)
    tensor = paddle.to_tensor(np.ascontiguousarray(array), place=like.place)
    return tensor if dtype_name(tensor) == dtype else tensor.astype(_DTYPES[dtype])


def permute(t: paddle.Tensor, axes: Sequence[int]) -> paddle.Tensor:
    return t.transpose(list(axes))


def view(t: paddle.Tensor, dtype: str) -> paddle.Tensor:
    """The memory of a contiguous tensor read as another dtype, along its last dimension; no copy."""
    return t.view(_DTYPES[dtype])


def concat(tensors: Sequence[paddle.Tensor], axis: int) -> paddle.Tensor:
    return paddle.concat(list(tensors), axis)


def cut(t: paddle.Tensor, at: int, axis: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Slices, which are views; in a program being traced the two outputs of one `split`.

    A program has no views, and the kernels of `slice` and `unsqueeze` that Paddle has for custom devices make nothing else.
    """
    if not paddle.in_dynamic_mode():
        return tuple(paddle.split(t, [at, -1], axis))
    whole = (slice(None),) * (axis % t.ndim)  # indexing takes less of the host than `paddle.slice`
    return t[(*whole, slice(at))], t[(*whole, slice(at, None))]


def exact_attention(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, *, is_causal: bool = False,
                    scale: float | None = None) -> paddle.Tensor:
    """Paddle's own attention, [B, N, H, D] in and out; GQA by repeating heads."""
    if scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (t.repeat_interleave(group, axis=2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def masked_attention(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
    """Paddle's own attention under a mask that broadcasts to [B, H, Nq, Nkv] (bool: True attends; else added)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if mask.dtype == paddle.bool else mask.astype(q.dtype))


@functools.cache
def _driver(ordinal: int) -> object:
    driver = triton_driver.device_driver(ordinal, lambda: _raw_stream(ordinal))
    # Before Triton makes its first launcher: one made without them takes no TMA descriptor for as long as the process lives.
    assert driver.utils is not None
    return driver


@functools.cache
def _place(ordinal: int) -> object:
    return placing.place(ordinal, lambda: _raw_stream(ordinal))


def launch_guard(t: paddle.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device and Paddle's current stream the ones that kernels are launched on."""
    ordinal = device_index(t)
    if ordinal < 0:
        return contextlib.nullcontext()
    if not chosen().shipped:
        return triton_driver.active(_driver(ordinal))
    return _shipped_guard(ordinal)


@contextlib.contextmanager
def _shipped_guard(ordinal: int) -> Iterator[None]:
    """`launch_guard` where kernels were shipped; Triton's driver is made ours only where Triton may launch too."""
    with triton_driver.active(_driver(ordinal)) if chosen().compiled else contextlib.nullcontext(), placing.on(_place(ordinal)):
        yield


def default_device() -> str:
    """"gpu:0", else the first custom device whose memory is CUDA's, such as "cudev:0", else "cpu"; of several processes on a
    host, each has the one that the launcher gives it."""
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        return f"gpu:{_launched_on('gpu') or 0}"
    seen = set()
    for name in paddle.device.get_available_custom_device() or ():
        kind, _, index = name.partition(":")
        if kind not in seen:
            seen.add(kind)
            index = _launched_on(kind) or index or "0"
            probe = paddle.empty([1], dtype="float32", device=paddle.CustomPlace(kind, int(index)))
            if cuda_driver.device_of_pointer(probe.data_ptr()) is not None:
                return f"{kind}:{index}"
    return "cpu"


def _launched_on(kind: str) -> str:
    """The number of the device that Paddle's launcher gives this process; "" where it gives none."""
    return os.environ.get(f"FLAGS_selected_{kind}s", "").split(",")[0]


def anchor(device: str = "auto") -> paddle.Tensor:
    """A small float32 tensor on a device ("auto", "cpu", "gpu:0", "cudev:0"), to stand for that place."""
    name = default_device() if device == "auto" else device
    kind, _, index = name.partition(":")
    custom = kind in (paddle.device.get_all_custom_device_type() or ())
    return paddle.zeros([64], dtype="float32", device=paddle.CustomPlace(kind, int(index or 0)) if custom else name)
