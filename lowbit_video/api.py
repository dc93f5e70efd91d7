"""`attention()` and `attention_varlen()`: low-bit attention on Paddle and torch tensors.

The choices become one `AttentionOptions`, and `engine.run` does the rest: check the tensors, select a kernel variant, run
it. What exists is declared in `kernels/variants.py`; a variant that does not fit says why, and nothing falls back silently.
"""
from __future__ import annotations

from typing import Any

from .engine.options import options_of
from .engine.packing import Packing
from .engine.run import run
from .graph.tracing import paddle_ops, traced_by_paddle, traced_by_torch
from .pooled import Pooled
from .precision import Precision


def attention(q: Any, k: Any, v: Any, precision: str | Precision = "int8+fp16", tensor_layout: str = "NHD",
              is_causal: bool = False, scale: float | None = None, return_lse: bool = False, backend: str = "auto",
              check_finite: bool | None = None, pooled: Pooled | None = None) -> Any:
    """softmax(scale * Q.K^T) V with Q.K^T and P.V at low bit.

    q: [B, Nq, Hq, D], k, v: [B, Nkv, Hkv, D] Paddle or torch tensors, float16, bfloat16 or float32, in the
        "NHD" layout; [B, H, N, D] in "HND". Hq is a multiple of Hkv (grouped queries); any strides. They
        are never changed.
    precision: "q[/k]+pv", such as "int8+fp16" or "int8/int4+fp8", or "exact"; see `Precision`.
    is_causal: query i sees key j if j <= i + Nkv - Nq (FlashAttention's bottom-right alignment); a row
        that sees no key gives zeros, and -inf as its LSE.
    scale: default D ** -0.5.
    return_lse: also return the natural-log log-sum-exp of the scaled scores, float32 [B, Hq, Nq],
        corrected for smoothing.
    backend: "auto" takes the first variant that fits; "reference" (NumPy, CPU tensors), "triton"
        (any NVIDIA GPU from sm_80 on) or "hopper" (sm_90) take that one or say why not.
    check_finite: look for NaN, infinity and magnitudes beyond the softmax's range in q, k and v first. Default: on a CPU
        only, because on a GPU the look would wait for the device.
    pooled: keep a share of the keys as they are and pool the rest; see `Pooled`. Not with is_causal.
    Returns out in q's layout and dtype, or (out, lse).
    Warns (SlowerThanExactWarning) where a GPU's exact attention is measured to be faster: short sequences.
    Raises UnsupportedError with every variant's reason, NonFiniteError naming tensor and count,
        ValueError or TypeError for shapes, layouts, precisions, dtypes and magnitudes that do not fit. It is inference
        only: UnsupportedError where gradients are asked for.
    Source: SageAttention2 (arXiv 2411.10958); accumulation and packing differ, see kernels/.
    """
    choices = (precision, tensor_layout, is_causal, scale, return_lse, backend, check_finite, False, pooled)
    if traced_by_torch(q):
        from .graph import torch_ops

        return torch_ops.attention(q, k, v, *choices)
    if traced_by_paddle(q):
        return paddle_ops().attention(q, k, v, *choices)
    out, lse, _ = run(q, k, v, options_of(*choices))
    return (out, lse) if return_lse else out


def attention_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
                     precision: str | Precision = "int8+fp16", is_causal: bool = False, scale: float | None = None,
                     return_lse: bool = False, backend: str = "auto", check_finite: bool | None = None) -> Any:
    """Attention within each of S packed sequences.

    q: [Tq, Hq, D]; k, v: [Tk, Hkv, D] Paddle or torch tensors, Hq a multiple of Hkv.
    cu_seqlens_q, cu_seqlens_k: int32 [S + 1] tensors on q's device: sequence s has rows cu[s] to cu[s + 1]. An
        empty sequence is allowed; queries whose sequence has no keys give zeros and an LSE of -inf.
    max_seqlen_q, max_seqlen_k: the longest sequences; a GPU call relies on them and cannot check without waiting.
    The rest as `attention`; K's mean (smoothing) is that of each sequence.
    Returns out [Tq, Hq, D], or (out, lse float32 [Hq, Tq]).
    Warns as `attention`, by the longest sequence of k.
    Raises as `attention`, and ValueError for cu_seqlens or longest sequences that do not fit (checked on the CPU only).
    """
    choices = (precision, "NHD", is_causal, scale, return_lse, backend, check_finite)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if traced_by_torch(q):
        from .graph import torch_ops

        return torch_ops.attention_varlen(q, k, v, *packing, *choices)
    if traced_by_paddle(q):
        return paddle_ops().attention_varlen(q, k, v, *packing, *choices)
    out, lse, _ = run(q, k, v, options_of(*choices), Packing(*packing))
    return (out, lse) if return_lse else out
