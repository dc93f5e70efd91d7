"""The function that diffusers' dispatcher calls: every argument is served or refused by name, on one rank or several.

The registry hands a function only what its signature names and drops the rest without a word: so all stand here.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import _templated_context_parallel_attention

from ...errors import UnsupportedError
from ...runtime import torch_runtime
from .names import RECIPE
from .operator import attend


def backend_function(name: str) -> Callable:
    """The backend of that name, as `_AttentionBackendRegistry` takes it."""

    def lowbit_backend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
                       dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
                       return_lse: bool = False, window_size: tuple[int, int] | None = None, softcap: float = 0.0,
                       return_attn_probs: bool = False, deterministic: bool = False, _parallel_config: Any = None) -> Any:
        """Attention of [B, S, H, D] tensors: out, or with return_lse (out, lse float32 [B, S, H], natural logarithm)."""
        _refuse(dropout_p=dropout_p, window_size=window_size, softcap=softcap, return_attn_probs=return_attn_probs)
        _check(query, key, attn_mask, is_causal, enable_gqa)
        if _parallel_config is not None and name == RECIPE:
            raise UnsupportedError("several ranks share this call by diffusers' enable_parallelism, which no recipe serves; "
                                   "take a backend of one precision such as lowbit_int8_fp8, or one rank")
        if _parallel_config is None:
            out, lse = attend(query, key, value, attn_mask, is_causal, scale, return_lse, name)
            return (out, lse.permute(0, 2, 1)) if return_lse else out
        if torch_runtime.wants_gradients(query, key, value):
            raise UnsupportedError("gradients are recorded, and low-bit attention on several ranks has none: run under "
                                   "torch.no_grad(), or set another attention backend")
        if attn_mask is not None and _parallel_config.context_parallel_config.ring_degree > 1:
            raise UnsupportedError(f"attn_mask of shape {list(attn_mask.shape)} in a ring: diffusers hands the keys of every "
                                   "rank the same mask; use ulysses_degree, which joins the ranks' masks, or pass no mask")
        return _templated_context_parallel_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, forward_op=forward_op,
            backward_op=None, _parallel_config=_parallel_config)

    def forward_op(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None,
                   dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, return_lse: bool,
                   _save_ctx: bool = True, _parallel_config: Any = None) -> Any:
        attn_mask = _of_own_heads(attn_mask, query.shape[2], _parallel_config)
        out, lse = attend(query, key, value, attn_mask, is_causal, scale, return_lse, name)
        return (out, lse.permute(0, 2, 1).contiguous()) if return_lse else out

    return lowbit_backend


NEUTRAL = {"dropout_p": (0.0,), "window_size": (None, (-1, -1)), "softcap": (None, 0.0), "return_attn_probs": (False,)}
"""What arguments that no low-bit kernel serves may be."""


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value not in NEUTRAL[name]:
            raise UnsupportedError(f"{name}={value} is not supported by low-bit attention; pass {name}={NEUTRAL[name][0]}, or "
                                   "set another attention backend")


def _check(query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool, enable_gqa: bool) -> None:
    if attn_mask is not None and is_causal:
        raise ValueError("is_causal=True and an attn_mask are given; pass one of them")
    if query.shape[2] != key.shape[2] and not enable_gqa:
        raise ValueError(f"query has {query.shape[2]} heads and key {key.shape[2]}; pass enable_gqa=True if that is meant")


def _of_own_heads(attn_mask: torch.Tensor | None, heads: int, parallel_config: Any) -> torch.Tensor | None:
    """The part of a mask for this rank's heads: diffusers shares heads, and hands over the mask of all (LTX has such a one)."""
    if attn_mask is None or attn_mask.ndim != 4 or attn_mask.shape[1] in (1, heads):
        return attn_mask
    first = heads * parallel_config.context_parallel_config._ulysses_local_rank
    return attn_mask[:, first:first + heads]
