"""What a framework must answer, so that all above works on its tensors; `paddle_runtime` and `torch_runtime` do."""
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Runtime(Protocol):
    """A module with these functions. `t`, `like`: a tensor of the framework; dtypes are names such as "float16"."""

    NAME: str

    def unreadable(self, t: Any) -> str | None:
        """What keeps a kernel from reading the tensor (a sparse layout, no memory), in words; None where nothing does."""

    def dtype_name(self, t: Any) -> str:
        """The tensor's dtype."""

    def shape(self, t: Any) -> tuple[int, ...]:
        """The tensor's dimensions."""

    def strides(self, t: Any) -> tuple[int, ...]:
        """The tensor's strides, in elements."""

    def signature(self, t: Any) -> tuple | None:
        """Shape, strides, dtype and device, to tell tensors apart quickly; None on a CPU and in a graph being traced."""

    def place(self, t: Any) -> str:
        """The device that holds the tensor, in words."""

    def is_cpu(self, t: Any) -> bool:
        """Whether the CPU holds it."""

    def arch(self, t: Any) -> tuple[int, int] | None:
        """Compute capability of the GPU that holds it; None on a CPU."""

    def processors(self, t: Any) -> int | None:
        """Multiprocessors of the GPU that holds it; None on a CPU."""

    def memory_gib(self, t: Any) -> float | None:
        """The whole memory of the GPU that holds it, in GiB; None on a CPU."""

    def stream(self, t: Any) -> int:
        """Raw handle of the framework's current stream on the tensor's device."""

    def wants_gradients(self, *tensors: Any) -> bool:
        """Whether what is computed of the tensors now would be differentiated."""

    def contiguous(self, t: Any) -> Any:
        """The tensor itself, or a contiguous copy."""

    def empty(self, shape: Sequence[int], dtype: str, like: Any) -> Any:
        """An uninitialised, contiguous tensor where `like` is."""

    def to_numpy(self, t: Any) -> np.ndarray:
        """The values; 16-bit floats become float32."""

    def from_numpy(self, array: np.ndarray, like: Any, dtype: str) -> Any:
        """A tensor of that dtype where `like` is."""

    def permute(self, t: Any, axes: Sequence[int]) -> Any:
        """The tensor with its dimensions in another order."""

    def view(self, t: Any, dtype: str) -> Any:
        """The memory of a contiguous tensor read as another dtype, along its last dimension; no copy."""

    def concat(self, tensors: Sequence[Any], axis: int) -> Any:
        """The tensors, one behind the other."""

    def cut(self, t: Any, at: int, axis: int) -> tuple[Any, Any]:
        """What lies before a place on an axis, and the rest: views, where no graph is traced."""

    def exact_attention(self, q: Any, k: Any, v: Any, *, is_causal: bool = False, scale: float | None = None) -> Any:
        """The framework's own attention, [B, N, H, D] in and out."""

    def masked_attention(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """The same under a mask that broadcasts to [B, H, Nq, Nkv] (bool: True attends; else added)."""

    def launch_guard(self, t: Any) -> contextlib.AbstractContextManager:
        """Makes the tensor's device and the framework's current stream the ones that kernels are launched on."""

    def anchor(self, device: str = "auto") -> Any:
        """A small float32 tensor on a device, to stand for that place."""
