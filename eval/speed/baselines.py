"""Exact attention to compare with, and SageAttention; packages of their own where they are installed. All take [B, H, N, D].

FlashAttention-2 and cuDNN come from PyTorch: in a run on Paddle tensors they get PyTorch tensors of the same values.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FLASH_ATTENTION_2 = "FlashAttention-2"


@dataclass(frozen=True)
class Baseline:
    """framework: whose tensors it takes. make(q, k, v, causal): the call to time. why_not(): why it cannot run, or None."""

    name: str
    framework: str
    make: Callable[[Any, Any, Any, bool], Callable[[], Any]]
    why_not: Callable[[], str | None]


def _torch_cuda() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch has no GPU"


def _sdpa(backend: str, q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = q.shape[1] != k.shape[1]

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call


def _flash_4(q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    from flash_attn.cute import flash_attn_func

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # it takes [B, N, H, D] and gives (out, lse or None)
    return lambda: flash_attn_func(q, k, v, causal=causal)[0].transpose(1, 2)


def _flash_4_why_not() -> str | None:
    """Source of the GPUs: `_flash_attn_fwd` of flash-attn-4 4.0.0b36, which asserts them."""
    if reason := _torch_cuda():
        return reason
    try:
        importlib.import_module("flash_attn.cute")  # FlashAttention-2's package has the same name above it
    except ImportError as error:
        return f"flash-attn-4 is not installed ({error})"
    import torch

    major, minor = torch.cuda.get_device_capability()
    return None if 8 <= major <= 12 else f"flash-attn-4 is for sm_80 to sm_12x, this GPU is sm_{major}{minor}"


def _sage(q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    from sageattention import sageattn

    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=causal)


def _sage_why_not() -> str | None:
    return _torch_cuda() or (None if importlib.util.find_spec("sageattention") else "sageattention is not installed")


def _paddle_flash(q: Any, k: Any, v: Any, causal: bool) -> Callable[[], Any]:
    import paddle

    q, k, v = (x.transpose([0, 2, 1, 3]).contiguous() for x in (q, k, v))
    return lambda: paddle.nn.functional.flash_attention.flash_attention(q, k, v, causal=causal)[0].transpose([0, 2, 1, 3])


def _paddle_flash_why_not() -> str | None:
    if importlib.util.find_spec("paddle") is None:
        return "Paddle is not installed"
    import paddle

    return None if paddle.is_compiled_with_cuda() else "this Paddle was built without CUDA and has none"


BASELINES = (
    Baseline(FLASH_ATTENTION_2, "torch", functools.partial(_sdpa, "FLASH_ATTENTION"), _torch_cuda),
    Baseline("cuDNN", "torch", functools.partial(_sdpa, "CUDNN_ATTENTION"), _torch_cuda),
    Baseline("FlashAttention-4", "torch", _flash_4, _flash_4_why_not),
    Baseline("SageAttention", "torch", _sage, _sage_why_not),
    Baseline("Paddle flash_attention", "paddle", _paddle_flash, _paddle_flash_why_not),
)
"""Beside these, every benchmark runs this project's own exact kernel, on Paddle without CUDA the only exact attention."""
