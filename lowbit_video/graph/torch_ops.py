"""Attention as one operator of `torch.compile`: opaque to the tracer, so that a graph holds it without a break.

Imported when a compiled function first reaches `attention()` or `attention_varlen()`; eager calls do not pass through here.
The choices travel as text, but for the scale and the longest sequences, which may be symbols of the graph.
"""
from __future__ import annotations

from dataclasses import replace

import torch

from ..engine.options import of_text, text_of
from ..engine.packing import Packing
from ..engine.run import run


@torch.library.custom_op("lowbit_video::attention", mutates_args=())
def attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, options: str
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with its options as text: (out, lse), lse empty unless asked for."""
    return _results(q, *run(q, k, v, _options(options, scale)))


@torch.library.custom_op("lowbit_video::attention_varlen", mutates_args=())
def varlen_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
              max_seqlen_q: int, max_seqlen_k: int, scale: float | None, options: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_varlen` with its options as text: (out, lse), lse empty unless asked for."""
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _results(q, *run(q, k, v, _options(options, scale), packing))


def _options(text, scale):
    options = of_text(text)
    return options if scale is None else replace(options, scale=scale)


def _results(q, out, lse, variant):
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@attention_op.register_fake
def _(q, k, v, scale, options):
    options = of_text(options)
    tokens, heads = (1, 2) if options.tensor_layout == "NHD" else (2, 1)
    rows = (q.shape[0], q.shape[heads], q.shape[tokens]) if options.return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@varlen_op.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, options):
    rows = (q.shape[1], q.shape[0]) if of_text(options).return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@torch.compiler.assume_constant_result
def capability(index: int) -> tuple[int, int]:
    """Compute capability of torch's CUDA device `index`: a constant of the graph, where asking the driver would break it."""
    from ..runtime import torch_runtime

    return torch_runtime.capability(index)


def attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, *rest):
    """What `lowbit_video.attention` does while torch.compile traces it."""
    out, lse = attention_op(q, k, v, scale, text_of(precision, tensor_layout, is_causal, None, return_lse, *rest))
    return (out, lse) if return_lse else out


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, tensor_layout, is_causal,
                     scale, return_lse, *rest):
    """What `lowbit_video.attention_varlen` does while torch.compile traces it."""
    out, lse = varlen_op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                         text_of(precision, tensor_layout, is_causal, None, return_lse, *rest))
    return (out, lse) if return_lse else out
