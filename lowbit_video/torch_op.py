"""Attention as one operator of `torch.compile`: opaque to the tracer, so that a graph holds it without a break.

Imported when a compiled function first reaches `attention()`; eager calls do not pass through here.
"""
from __future__ import annotations

import torch

from lowbit_video.precision import Precision


@torch.library.custom_op("lowbit_video::attention", mutates_args=())
def attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: str, granularity: str | None, smooth_k: bool | None,
                 smooth_q: bool | None, tensor_layout: str, is_causal: bool, scale: float | None, return_lse: bool,
                 backend: str, check_finite: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with the precision taken apart: (out, lse), lse empty unless asked for."""
    from lowbit_video.attention import run

    precision = Precision(spec, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q)
    out, lse, _ = run(q, k, v, precision, tensor_layout=tensor_layout, is_causal=is_causal, scale=scale, return_lse=return_lse,
                      backend=backend, check_finite=check_finite)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@attention_op.register_fake
def _(q, k, v, spec, granularity, smooth_k, smooth_q, tensor_layout, is_causal, scale, return_lse, backend, check_finite):
    tokens, heads = (1, 2) if tensor_layout == "NHD" else (2, 1)
    rows = (q.shape[0], q.shape[heads], q.shape[tokens]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


def attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, backend, check_finite):
    """What `lowbit_video.attention` does while torch.compile traces it."""
    spec, choices = (precision, (None, None, None)) if isinstance(precision, str) else (
        precision.spec, (precision.granularity, precision.smooth_k, precision.smooth_q))
    if not isinstance(precision, str) and precision.exact:
        choices = (None, None, None)
    out, lse = attention_op(q, k, v, spec, *choices, tensor_layout, is_causal, scale, return_lse, backend, check_finite)
    return (out, lse) if return_lse else out
