"""Attention as one operator of `torch.compile`: opaque to the tracer, so that a graph holds it without a break.

Imported when a compiled function first reaches `attention()` or `attention_varlen()`; eager calls do not pass through here.
"""
from __future__ import annotations

import torch

from ..precision import Precision


@torch.library.custom_op("lowbit_video::attention", mutates_args=())
def attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: str, granularity: str | None, smooth_k: bool | None,
                 smooth_q: bool | None, tensor_layout: str, is_causal: bool, scale: float | None, return_lse: bool,
                 backend: str, check_finite: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with the precision taken apart: (out, lse), lse empty unless asked for."""
    from ..api import run

    precision = Precision(spec, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q)
    out, lse, _ = run(q, k, v, precision, tensor_layout=tensor_layout, is_causal=is_causal, scale=scale, return_lse=return_lse,
                      backend=backend, check_finite=check_finite)
    return _results(q, out, lse)


@torch.library.custom_op("lowbit_video::attention_varlen", mutates_args=())
def varlen_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
              max_seqlen_q: int, max_seqlen_k: int, spec: str, granularity: str | None, smooth_k: bool | None,
              smooth_q: bool | None, is_causal: bool, scale: float | None, return_lse: bool, backend: str,
              check_finite: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_varlen` with the precision taken apart: (out, lse), lse empty unless asked for."""
    from ..varlen import run_varlen

    precision = Precision(spec, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q)
    out, lse, _ = run_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, is_causal=is_causal,
                             scale=scale, return_lse=return_lse, backend=backend, check_finite=check_finite)
    return _results(q, out, lse)


def _results(q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@attention_op.register_fake
def _(q, k, v, spec, granularity, smooth_k, smooth_q, tensor_layout, is_causal, scale, return_lse, backend, check_finite):
    tokens, heads = (1, 2) if tensor_layout == "NHD" else (2, 1)
    rows = (q.shape[0], q.shape[heads], q.shape[tokens]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


@varlen_op.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, spec, granularity, smooth_k, smooth_q, is_causal, scale,
      return_lse, backend, check_finite):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=torch.float32)


@torch.compiler.assume_constant_result
def capability(index: int) -> tuple[int, int]:
    """Compute capability of torch's CUDA device `index`: a constant of the graph, where asking the driver would break it."""
    from ..runtime import torch_runtime

    return torch_runtime.capability(index)


def _apart(precision):
    """What makes the precision anew: spec, granularity, smooth_k, smooth_q."""
    if isinstance(precision, str):
        return precision, None, None, None
    if precision.exact:
        return precision.spec, None, None, None
    return precision.spec, precision.granularity, precision.smooth_k, precision.smooth_q


def attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, backend, check_finite):
    """What `lowbit_video.attention` does while torch.compile traces it."""
    out, lse = attention_op(q, k, v, *_apart(precision), tensor_layout, is_causal, scale, return_lse, backend, check_finite)
    return (out, lse) if return_lse else out


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, is_causal, scale, return_lse,
                     backend, check_finite):
    """What `lowbit_video.attention_varlen` does while torch.compile traces it."""
    out, lse = varlen_op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_apart(precision), is_causal, scale,
                         return_lse, backend, check_finite)
    return (out, lse) if return_lse else out
