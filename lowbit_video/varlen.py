"""`attention_varlen()`: sequences of different lengths packed along one token dimension.

On a GPU one launch serves them all. On the CPU, and for a variant that takes padded batches only, each
sequence goes through `attention.run` by itself.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lowbit_video.kernels.variants import KernelVariant

from .api import (
    make_request,
    paddle_call,
    require_finite,
    require_one_place,
    run,
    select,
    traced_by_paddle,
    traced_by_torch,
    warn_if_slower,
)
from .engine import replay as plans
from .precision import Precision, as_precision
from .runtime import detect


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
    if traced_by_torch(q):
        from .graph import torch_ops as torch_op

        return torch_op.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, is_causal,
                                         scale, return_lse, backend, check_finite)
    if traced_by_paddle(q):
        return paddle_call().attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision,
                                              is_causal, scale, return_lse, backend, check_finite)
    out, lse, _ = run_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, is_causal=is_causal,
                             scale=scale, return_lse=return_lse, backend=backend, check_finite=check_finite)
    return (out, lse) if return_lse else out


def run_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
               precision: str | Precision, *, is_causal: bool = False, scale: float | None = None, return_lse: bool = False,
               backend: str = "auto", check_finite: bool | None = None) -> tuple[Any, Any, KernelVariant]:
    """As `attention_varlen`, but returns (out, lse or None, the variant that ran)."""
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    runtime = detect.same_runtime(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    key = None if check_finite else plans.key_of(runtime, tensors, precision, max_seqlen_q, max_seqlen_k, is_causal, scale,
                                                 return_lse, backend)
    plan = plans.find(key)
    if plan is not None and (result := plan.run(runtime, tensors)) is not None:
        return (*result, plan.variant)
    precision = as_precision(precision)
    if any(len(runtime.shape(t)) != 3 for t in (q, k, v)):
        given = ", ".join(f"{name} {list(runtime.shape(t))}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"q, k and v must be packed as [tokens, heads, head_dim]; given: {given}")
    batch = _check_lengths(runtime, cu_seqlens_q, cu_seqlens_k)
    require_one_place(runtime, q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    request = make_request(q[None], k[None], v[None], precision, tensor_layout="NHD", is_causal=is_causal,
                           return_lse=return_lse, runtime=runtime)
    request = dataclasses.replace(request, varlen=True, q_len=int(max_seqlen_q), kv_len=int(max_seqlen_k))
    variant = select(request, backend)
    warn_if_slower(variant, request)
    if check_finite or (check_finite is None and request.device == "cpu"):
        require_finite(runtime, q=q, k=k, v=v)
    scale = request.head_dim**-0.5 if scale is None else float(scale)
    if variant.backend == "reference":
        q_begins = _beginnings(runtime, "q", cu_seqlens_q, runtime.shape(q)[0], max_seqlen_q)
        k_begins = _beginnings(runtime, "k", cu_seqlens_k, runtime.shape(k)[0], max_seqlen_k)
        out, lse = _one_by_one(runtime, q, k, v, q_begins, k_begins, precision, is_causal, scale, return_lse)
        return out, lse, variant
    from .engine.gpu import Sequences, run_attention

    if not all(runtime.strides(cu) == (1,) for cu in (cu_seqlens_q, cu_seqlens_k)):
        cu_seqlens_q, cu_seqlens_k, key = runtime.contiguous(cu_seqlens_q), runtime.contiguous(cu_seqlens_k), None
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, batch, int(max_seqlen_q), int(max_seqlen_k))
    result = run_attention(variant, precision, q, k, v, runtime=runtime, tensor_layout="NHD", is_causal=is_causal, scale=scale,
                           return_lse=return_lse, sequences=sequences, key=key)
    out, lse = result if return_lse else (result, None)
    return out, lse, variant


def _check_lengths(runtime: Any, cu_seqlens_q: Any, cu_seqlens_k: Any) -> int:
    """The number of sequences; ValueError for beginnings that no batch could have."""
    shapes = [runtime.shape(cu) for cu in (cu_seqlens_q, cu_seqlens_k)]
    dtypes = [runtime.dtype_name(cu) for cu in (cu_seqlens_q, cu_seqlens_k)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0][0] < 2 or dtypes != ["int32", "int32"]:
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be int32 of one length, [sequences + 1]; given: "
                         f"{dtypes[0]} {list(shapes[0])} and {dtypes[1]} {list(shapes[1])}")
    return shapes[0][0] - 1


def _beginnings(runtime: Any, name: str, cu_seqlens: Any, tokens: int, longest: int) -> np.ndarray:
    values = runtime.to_numpy(cu_seqlens)
    if values[0] != 0 or values[-1] != tokens or (np.diff(values) < 0).any():
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to the {tokens} tokens that are packed; given: {values.tolist()}")
    if np.diff(values).max() > longest:
        raise ValueError(f"max_seqlen_{name} is {longest}, but a sequence has {np.diff(values).max()} tokens; a GPU would "
                         "leave the rest of it out")
    return values


def _one_by_one(runtime: Any, q: Any, k: Any, v: Any, cu_q: np.ndarray, cu_k: np.ndarray, precision: Precision,
                is_causal: bool, scale: float, return_lse: bool) -> tuple[Any, Any]:
    q_heads, dtype = runtime.shape(q)[1], runtime.dtype_name(q)
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        rows = int(q1 - q0)
        if rows == 0:
            continue
        if k0 == k1:
            outs.append(runtime.from_numpy(np.zeros((rows, q_heads, runtime.shape(q)[2]), np.float32), q, dtype))
            lses.append(runtime.from_numpy(np.full((q_heads, rows), -np.inf, np.float32), q, "float32"))
            continue
        out, lse, _ = run(q[int(q0):int(q1)][None], k[int(k0):int(k1)][None], v[int(k0):int(k1)][None], precision,
                          is_causal=is_causal, scale=scale, return_lse=True, backend="reference", check_finite=False)
        outs.append(out[0])
        lses.append(lse[0])
    if not outs:
        raise ValueError("no sequence has a query")
    return runtime.concat(outs, 0), runtime.concat(lses, 1) if return_lse else None
