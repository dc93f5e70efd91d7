"""The ways a model's attention is computed while its step is timed: exact ones, ours, and none at all (the ceiling).

Exact kernels stand in for PyTorch's `scaled_dot_product_attention`, in which every model here ends, while the step runs. Each
is one operator of a compiled graph. Ours are set as users set them: by `lowbit_video.apply`, or as a backend of diffusers'
dispatcher.
"""
from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lowbit_video
from lowbit_video.hook.dispatcher.names import backend_names
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.hook.report import attention_modules, dispatching_modules
from lowbit_video.precision import Precision, names_recipe

from .. import baselines
from .names import APART, NONE, OURS, PADDLE, PYTORCH, SAGE, TITLES, pools
from .ways import Method, apply_ours, set_processors

SDPA = F.scaled_dot_product_attention


def why_not(method: str, device: str, dispatches: bool = False, fuses: bool = True) -> str | None:
    """Why a method is left out on a device, and of a model whose attention goes through diffusers' dispatcher; or None.

    fuses: whether the model leaves norms and positions to its processors.
    """
    if method == PADDLE:
        return "it takes Paddle's tensors"
    if method.endswith(APART) and not fuses:
        return "this model computes norms and positions itself"
    if dispatches and method == OURS:
        return "no backend of diffusers' dispatcher is this project's exact attention"
    if method in ("fa2", "cudnn", "fa4", SAGE) and device == "cpu":
        return "needs an NVIDIA GPU"
    return {"fa4": baselines._flash_4_why_not, SAGE: baselines._sage_why_not}.get(method, lambda: None)()


@contextlib.contextmanager
def methods_of(model: Any, dispatches: bool, names: list[str], leading_keys: int | None) -> Iterator[dict[str, Method]]:
    """Methods by name for a model, which is as before afterwards.

    leading_keys: how many keys of its joint attention a mask leaves, for exact kernels that take no mask; None: it has none.
    """
    modules = list(attention_modules(model).values())
    plain = {module: module.processor for module in modules}
    low = [name for name in names if name not in TITLES]
    put: dict[str, Callable[[], None]] = {}
    contexts = {name: _context(name, leading_keys) for name in names}
    with contextlib.ExitStack() as undo:
        undo.callback(set_processors, plain)
        if dispatches:
            from diffusers.models.attention_dispatch import AttentionBackendName

            undo.callback(lowbit_video.unregister_diffusers)
            lowbit_video.register_diffusers(model)
            backends = {spec: backend for backend, (spec, fallback) in backend_names().items() if fallback}
        for name in names:
            if name in low and not dispatches:
                undo.callback(lowbit_video.remove, model)
                apply_ours(model, name)
                own = {module: module.processor for module in modules}
            elif name in low and pools(name):
                put[name] = _of_recipe(model, name)
                contexts[name] = lambda: lowbit_video.denoising_step(model, 1, 2)
                continue
            else:
                own = {module: _of_method(processor, name) for module, processor in plain.items()}
            if dispatches:
                backend = AttentionBackendName(backends[str(Precision(name))] if name in low else "native")
                for processor in own.values():
                    if hasattr(processor, "_attention_backend"):  # HunyuanVideo's refiner of text asks torch itself
                        processor._attention_backend = backend
            put[name] = lambda own=own: set_processors(own)
        yield {name: Method(name, contexts[name], put[name]) for name in names}


def _of_recipe(model: Any, method: str) -> Callable[[], None]:
    """What puts a recipe or a pooled rung into a model that asks diffusers' dispatcher, which is as before."""
    recipe = Recipe.load(method) if names_recipe(method) else Recipe([{"rung": method}])
    with lowbit_video.apply(model, recipe, fallback="exact"):
        own = {module: _of_method(module.processor, method) for module in attention_modules(model).values()}
        attentions = {module: module.attention_calls.attention for module in dispatching_modules(model).values()}

    def put() -> None:
        set_processors(own)
        for module, attention in attentions.items():
            module.attention_calls.attention = attention

    return put


def _of_method(processor: Any, method: str) -> Any:
    """A copy of a class of its own: by the class a compiled graph of one method is not taken for another's."""
    twin = copy.copy(processor)
    twin.__class__ = _class_of_method(type(processor), method)
    return twin


@functools.cache
def _class_of_method(kind: type, method: str) -> type:
    """One for all blocks, which then share a graph."""
    return type(f"{kind.__name__}_{method}", (kind,), {})


def _context(name: str, leading_keys: int | None) -> Callable[[], contextlib.AbstractContextManager]:
    """What is around a step: ours and PyTorch's own need nothing."""
    if name == PYTORCH or name not in TITLES:
        return contextlib.nullcontext
    operator = {"fa2": flash_2, "cudnn": cudnn, "fa4": flash_4, SAGE: sage, NONE: nothing}[name]

    def serve(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:
        if name != NONE and (attn_mask is not None or is_causal or enable_gqa):
            if leading_keys is None or query.shape[2] != key.shape[2] or key.shape[2] < leading_keys:
                return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            key, value = key[:, :, :leading_keys], value[:, :, :leading_keys]
        return operator(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)

    return lambda: mock.patch.object(F, "scaled_dot_product_attention", serve)


def _operator(compute: Callable) -> Callable:
    """One operator of a graph, of q, k, v [B, H, N, D] and the scale; gives [B, H, N, D] whose memory is [B, N, H, D]."""
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return compute(q, k, v, scale).transpose(1, 2).contiguous().transpose(1, 2)

    made = torch.library.custom_op(f"lowbit_video_bench::{compute.__name__}", run, mutates_args=())
    made.register_fake(lambda q, k, v, scale: torch.empty_like(q.transpose(1, 2),
                                                               memory_format=torch.contiguous_format).transpose(1, 2))
    return made


@_operator
def flash_2(q, k, v, scale):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return SDPA(q, k, v, scale=scale)


@_operator
def cudnn(q, k, v, scale):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return SDPA(q, k, v, scale=scale)


@_operator
def flash_4(q, k, v, scale):
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale)  # [B, N, H, D]
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@_operator
def sage(q, k, v, scale):
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND", sm_scale=scale)


@_operator
def nothing(q, k, v, scale):
    """As if attention took no time: the queries, copied only if their memory is in another order."""
    return q.clone() if q.transpose(1, 2).is_contiguous() else q
