"""Attention as one operator of `torch.compile`: opaque to the tracer, so that a graph holds it without a break.

Imported when a compiled function first reaches `attention()` or `attention_varlen()`, or a module's slot is made; eager calls
do not pass through here. The choices travel as text, but for the scale and the longest sequences, which may be symbols of the
graph. A module's attention (`slots.py`) is an operator too, which runs whatever processor the module has then.
The operators have no gradients. `gradients` tells them that some are asked for, and they raise when they are reached: what is
raised while torch traces reaches the caller as an error of the tracer.
"""
from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch

from ..engine.checks import inference_only
from ..engine.options import of_text, text_of
from ..engine.packing import Packing
from ..engine.run import run
from ..token_order import raster_order, token_order
from .runners import runner_of
from .steps import with_tensors, without_tensors


@torch.library.custom_op("lowbit_video::attention", mutates_args=())
def attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, options: str,
                 gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with its options as text: (out, lse), lse empty unless asked for."""
    _refuse(gradients)
    return _results(q, *run(q, k, v, _options(options, scale)))


@torch.library.custom_op("lowbit_video::attention_varlen", mutates_args=())
def varlen_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
              max_seqlen_q: int, max_seqlen_k: int, scale: float | None, options: str, gradients: bool = False
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_varlen` with its options as text: (out, lse), lse empty unless asked for."""
    _refuse(gradients)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _results(q, *run(q, k, v, _options(options, scale), packing))


@torch.library.custom_op("lowbit_video::module_attention", mutates_args=())
def module_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, key: torch.Tensor,
              gradients: bool = False, apart: str = "") -> torch.Tensor:
    """Attention of [B, N, H, D] tensors by the module whose slot has that key; the output is q's shape and dtype.

    apart: for the report, why norms and positions are in the graph where they were to be fused.
    """
    if gradients:
        q = q.detach().requires_grad_()
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    with torch.set_grad_enabled(gradients):  # as the caller had it: the processor refuses, and names its module
        return runner_of(int(key)).run(*tensors, apart=apart).detach().contiguous()


@torch.library.custom_op("lowbit_video::module_attention_behind", mutates_args=())
def behind_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: list[torch.Tensor], begin: int, steps: str,
              key: torch.Tensor) -> torch.Tensor:
    """The same of q and k as their projections left them, and so without a mask.

    tensors, begin, steps: norms and positions, as `steps.without_tensors` has them.
    """
    with torch.no_grad():
        return runner_of(int(key)).run(q, k, v, steps=with_tensors(steps, tensors, begin)).contiguous()


@torch.library.custom_op("lowbit_video::denoising_step", mutates_args=())
def step_op(timestep: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The timestep, told to the clock of that key (`hook/recipe/clock.py`) when a graph reaches this."""
    runner_of(int(key)).tell(timestep.clone())  # of its own: the graph may write over its tensors before this one is read
    return timestep.clone()


@step_op.register_fake
def _(timestep, key):
    return timestep.new_empty(timestep.shape)


@torch.library.custom_op("lowbit_video::token_order", mutates_args=())
def order_op(like: torch.Tensor, order: str, frames: int, height: int, width: int, back: bool) -> torch.Tensor:
    """`token_order` of a grid where `like` is, or, to go back, `raster_order`; an operator, so that a graph serves any grid."""
    return _places(order, frames, height, width, back, like.device).clone()


@order_op.register_fake
def _(like, order, frames, height, width, back):
    return like.new_empty(frames * height * width, dtype=torch.int64)


@functools.cache  # for good: a CUDA graph may read them
def _places(order, frames, height, width, back, device):
    with torch.inference_mode(False):  # it may serve a call that is trained through later
        return torch.tensor((raster_order if back else token_order)(order, frames, height, width), device=device)


def _refuse(gradients):
    if gradients:
        raise inference_only("torch")


def _without_gradients(*tensors):
    """The tensors for an operator, and whether gradients of them are asked for."""
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        return [t.detach() for t in tensors], True
    return tensors, False


def _options(text, scale):
    options = of_text(text)
    return options if scale is None else replace(options, scale=scale)


def _results(q, out, lse, variant):
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@attention_op.register_fake
def _(q, k, v, scale, options, gradients=False):
    options = of_text(options)
    tokens, heads = (1, 2) if options.tensor_layout == "NHD" else (2, 1)
    rows = (q.shape[0], q.shape[heads], q.shape[tokens]) if options.return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@varlen_op.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, options, gradients=False):
    rows = (q.shape[1], q.shape[0]) if of_text(options).return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@module_op.register_fake
def _(q, k, v, mask, key, gradients=False, apart=""):
    return q.new_empty(q.shape)


@behind_op.register_fake
def _(q, k, v, tensors, begin, steps, key):
    return q.new_empty(q.shape)


def key_of(number: int) -> torch.Tensor:
    """The key of a module's slot: a tensor, which a graph takes as an input, so that alike blocks share one graph."""
    with torch.inference_mode(False):
        return torch.tensor(number, device="cpu")


def attention_of_module(attn, q, k, v, mask, key, apart=""):
    """The attention of the module whose slot has that key, while torch.compile traces it. apart: as `module_op`.

    Where its processor can be trained through, it runs eagerly then: the graph breaks.
    """
    (a, b, c), gradients = _without_gradients(q, k, v)
    if gradients and attn.processor.differentiable:
        return _eagerly(attn.processor.run, attn, q, k, v, mask)
    return module_op(a, b, c, mask, key, gradients, apart)


def attention_behind_steps(attn, q, k, v, before, key):
    """The same of q and k that lack norms and positions. before: those, as the hook has them."""
    (a, b, c), gradients = _without_gradients(q, k, v)
    if gradients:
        return attention_of_module(attn, *before.prepare(q, k), v, None, key)
    text, tensors, begin = without_tensors(before.steps)
    return behind_op(a, b, c, tensors, begin, text, key)


@torch.compiler.disable
def _eagerly(function, *given):
    return function(*given)


_compilation: list[weakref.ref] = []


@torch.compiler.assume_constant_result
def once_a_compilation(work: Callable[[], None]) -> bool:
    """Does a plain function's work while torch.compile traces, unseen by it; once in a compilation, however often it is asked.

    It takes no object that work is done on: the tracer would tie the graph to that one.
    """
    context = torch._guards.CompileContext.try_get()
    if context is None or not _compilation or _compilation[0]() is not context:
        work()
        _compilation[:] = [] if context is None else [weakref.ref(context)]
    return True


@torch.compiler.assume_constant_result
def capability(index: int) -> tuple[int, int]:
    """Compute capability of torch's CUDA device `index`: a constant of the graph, where asking the driver would break it."""
    from ..runtime import torch_runtime

    return torch_runtime.capability(index)


def attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, *rest):
    """What `lowbit_video.attention` does while torch.compile traces it."""
    (q, k, v), gradients = _without_gradients(q, k, v)
    options = text_of(precision, tensor_layout, is_causal, None, return_lse, *rest)
    out, lse = attention_op(q, k, v, scale, options, gradients)
    return (out, lse) if return_lse else out


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, tensor_layout, is_causal,
                     scale, return_lse, *rest):
    """What `lowbit_video.attention_varlen` does while torch.compile traces it."""
    (q, k, v), gradients = _without_gradients(q, k, v)
    options = text_of(precision, tensor_layout, is_causal, None, return_lse, *rest)
    out, lse = varlen_op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, options, gradients)
    return (out, lse) if return_lse else out
