"""SageAttention's function names over this project's attention, for code that was written against them.

    from lowbit_video.compat import sageattn_qk_int8_pv_fp16_triton

Every `sageattn...` has a `lowbit_fa...` twin that is the same function. Arguments, their order and
their defaults are SageAttention's (tensor_layout "HND", sm_scale None = head_dim ** -0.5), but for
qk_quant_gran, which is "per_block", the fastest here; an argument that cannot be honoured raises, and
an unknown one is a TypeError: nothing is swallowed.

A name that ends in `_triton` runs the portable Triton kernel. One that ends in `_cuda` runs the best
kernel of that precision on this GPU, whatever language it is written in. Tensors on the CPU go
through the NumPy reference with either.

Source: https://github.com/thu-ml/SageAttention for names and arguments; the code is this project's.
"""
from __future__ import annotations

import itertools

from .api import attention, attention_varlen
from .arguments import flag, shown
from .graph.tracing import paddle_ops, traced_by_paddle, traced_by_torch
from .precision import GRANULARITIES, Precision, precision_specs
from .runtime import detect

GRANULARITY_OF = {"per_block": "block", "per_token": "token", "per_warp": "token", "per_thread": "token"}
"""SageAttention's names for what shares a scale, and ours. Per warp (16 or 32 rows) and per thread (every
eighth row) have no twin here: the scales of single rows are finer than both."""

FLOAT32_SUMS = ("fp32", "fp32+fp32")
"""What `pv_accum_dtype` can ask for and get: the sums of P.V are float32, each tile's added in registers."""


def _granularity(qk_quant_gran: str | None) -> str | None:
    if qk_quant_gran is None:
        return None
    if not isinstance(qk_quant_gran, str) or qk_quant_gran not in GRANULARITY_OF:
        raise ValueError(f"qk_quant_gran={shown(qk_quant_gran)} is unknown; there are: {', '.join(GRANULARITY_OF)}")
    return GRANULARITY_OF[qk_quant_gran]


def _refuse(name: str, value: object, wanted: object, why: str) -> None:
    if type(value) is not type(wanted) or value != wanted:
        given = value if isinstance(value, (str, bool)) else type(value).__name__
        raise ValueError(f"{name}={given!r} is not supported: {why}; pass {name}={wanted!r}")


def _check_sums(pv_accum_dtype: str) -> None:
    if not isinstance(pv_accum_dtype, str) or pv_accum_dtype not in FLOAT32_SUMS:
        raise ValueError(f"pv_accum_dtype={shown(pv_accum_dtype)} is not supported: the sums of P.V are float32 here, never "
                         f"narrower; pass one of {', '.join(map(repr, FLOAT32_SUMS))}")


def _arch(q: object) -> tuple[int, int] | None:
    """Compute capability of the GPU that q is on, or in a graph being traced will be on; None for a CPU."""
    if traced_by_paddle(q):
        return paddle_ops().arch_of_graph()
    runtime = detect.runtime_of(q)
    if runtime.is_cpu(q):
        return None
    if traced_by_torch(q):
        from .graph import torch_ops

        return torch_ops.capability(q.device.index)
    return runtime.arch(q)


def _triton(q: object) -> str:
    return "auto" if _arch(q) is None else "triton"


def _best_spec(q: object) -> str:
    arch = _arch(q)
    return "int8+fp8" if arch is not None and tuple(arch) >= (8, 9) else "int8+fp16"


_PRECISIONS = {choices: Precision(*choices) for choices in itertools.product(
    (spec for spec in precision_specs() if "+" in spec), (None, *GRANULARITIES), (True, False), (None, True, False))}
"""Made beforehand, by their arguments: Paddle's SOT cannot make a dataclass in a function that it traces."""


def _precision(spec: str, granularity: str | None = None, smooth_k: bool = True, smooth_q: bool | None = None) -> Precision:
    if not isinstance(smooth_k, bool):
        smooth_k = flag("smooth_k", smooth_k)
    if smooth_q is not None and not isinstance(smooth_q, bool):
        smooth_q = flag("smooth_q", smooth_q)
    choices = (spec, granularity, smooth_k, smooth_q)
    return _PRECISIONS[choices] if choices in _PRECISIONS else Precision(*choices)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, smooth_k=True):
    """Attention with INT8 Q.K^T, and P.V in FP8 where the GPU has FP8 (sm_89 and later), else in 16 bits.

    q: [B, Hq, Nq, D], k, v: [B, Hkv, Nkv, D] ("HND"), or [B, N, H, D] ("NHD"); float16 or bfloat16.
    sm_scale: factor on Q.K^T, default D ** -0.5.
    Returns the output in q's shape, dtype and layout; with return_lse also the natural logarithm of
    the softmax's denominator, float32 [B, Hq, Nq], corrected for smoothing.
    """
    return attention(q, k, v, _precision(_best_spec(q), smooth_k=smooth_k), tensor_layout=tensor_layout, is_causal=is_causal,
                     scale=sm_scale, return_lse=return_lse)


def sageattn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=False, sm_scale=None,
                    smooth_k=True, return_lse=False):
    """INT8 Q.K^T and 16-bit P.V over sequences of different lengths packed into one.

    q: [Tq, Hq, D]; k, v: [Tk, Hkv, D]; cu_seqlens: int32 [batch + 1], where each sequence begins.
    smooth_k: the mean subtracted from K is that of each sequence. return_lse: also the LSE, float32 [Hq, Tq].
    """
    return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                            precision=_precision("int8+fp16", smooth_k=smooth_k), is_causal=is_causal, scale=sm_scale,
                            return_lse=return_lse)


def sageattn_qk_int8_pv_fp16_triton(q, k, v, tensor_layout="HND", quantization_backend="triton", is_causal=False,
                                    attn_mask=None, sm_scale=None, smooth_k=True, return_lse=False):
    """INT8 Q.K^T, P.V in the tensors' 16-bit type, portable Triton kernel. Shapes as `sageattn`.

    quantization_backend: "triton" only. attn_mask: None only (no kernel here takes a mask).
    """
    _refuse("quantization_backend", quantization_backend, "triton", "Q and K are quantised by Triton kernels")
    _refuse("attn_mask", attn_mask, None, "the low-bit kernels attend to every key, or causally")
    return attention(q, k, v, _precision("int8+fp16", smooth_k=smooth_k), tensor_layout=tensor_layout, is_causal=is_causal,
                     scale=sm_scale, return_lse=return_lse, backend=_triton(q))


def sageattn_qk_int4_pv_fp16_triton(q, k, v, tensor_layout="HND", quantization_backend="triton", is_causal=False,
                                    attn_mask=None, sm_scale=None, smooth_k=True, return_lse=False):
    """INT4 Q.K^T (scales per token, Q smoothed too), P.V in 16 bits, portable Triton kernel. Shapes as `sageattn`."""
    _refuse("quantization_backend", quantization_backend, "triton", "Q and K are quantised by Triton kernels")
    _refuse("attn_mask", attn_mask, None, "the low-bit kernels attend to every key, or causally")
    return attention(q, k, v, _precision("int4+fp16", smooth_k=smooth_k), tensor_layout=tensor_layout, is_causal=is_causal,
                     scale=sm_scale, return_lse=return_lse, backend=_triton(q))


def sageattn_qk_int8_pv_fp16_cuda(q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_block", sm_scale=None,
                                  pv_accum_dtype="fp32", smooth_k=True, smooth_v=False, return_lse=False):
    """INT8 Q.K^T, P.V in the tensors' 16-bit type: the best kernel of that precision on this GPU.

    qk_quant_gran: "per_block" (default here), "per_token"; "per_warp" and "per_thread" are served by scales per token,
    which are finer. pv_accum_dtype: "fp32" or "fp32+fp32". smooth_v: False only.
    """
    _check_sums(pv_accum_dtype)
    _refuse("smooth_v", smooth_v, False, "sums of P.V are float32, which needs no smoothing of V")
    return attention(q, k, v, _precision("int8+fp16", granularity=_granularity(qk_quant_gran), smooth_k=smooth_k),
                     tensor_layout=tensor_layout, is_causal=is_causal, scale=sm_scale, return_lse=return_lse)


def sageattn_qk_int8_pv_fp8_cuda(q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_block", sm_scale=None,
                                 pv_accum_dtype="fp32+fp32", smooth_k=True, smooth_v=False, return_lse=False):
    """INT8 Q.K^T, FP8 (e4m3) P.V: the best kernel of that precision on this GPU. Arguments as its fp16 neighbour."""
    _check_sums(pv_accum_dtype)
    _refuse("smooth_v", smooth_v, False, "sums of P.V are float32, which needs no smoothing of V")
    return attention(q, k, v, _precision("int8+fp8", granularity=_granularity(qk_quant_gran), smooth_k=smooth_k),
                     tensor_layout=tensor_layout, is_causal=is_causal, scale=sm_scale, return_lse=return_lse)


def sageattn_multi_precision(q, k, v, q_format="int8", k_format="int4", pv_format="fp16", tensor_layout="HND",
                             is_causal=False, qk_quant_gran=None, sm_scale=None, smooth_k=True, smooth_q=None,
                             return_lse=False):
    """A bit width for each operand: q_format/k_format among "int8", "int4", "int2", "fp8"; pv_format "fp16" or "fp8".

    Raises ValueError for a combination without a kernel, listing those that have one. qk_quant_gran and
    smooth_q None: what suits the formats (see `Precision`).
    """
    for name, value in (("q_format", q_format), ("k_format", k_format), ("pv_format", pv_format)):
        if not isinstance(value, str):
            raise ValueError(f"{name}={shown(value)} is unknown; precisions are: {', '.join(precision_specs())}")
    spec = f"{q_format}+{pv_format}" if q_format == k_format else f"{q_format}/{k_format}+{pv_format}"
    precision = _precision(spec, granularity=_granularity(qk_quant_gran), smooth_k=smooth_k, smooth_q=smooth_q)
    return attention(q, k, v, precision, tensor_layout=tensor_layout, is_causal=is_causal, scale=sm_scale,
                     return_lse=return_lse)


lowbit_fa = sageattn
lowbit_fa_varlen = sageattn_varlen
lowbit_fa_qk_int8_pv_fp16_triton = sageattn_qk_int8_pv_fp16_triton
lowbit_fa_qk_int4_pv_fp16_triton = sageattn_qk_int4_pv_fp16_triton
lowbit_fa_qk_int8_pv_fp16_cuda = sageattn_qk_int8_pv_fp16_cuda
lowbit_fa_qk_int8_pv_fp8_cuda = sageattn_qk_int8_pv_fp8_cuda
lowbit_fa_multi_precision = sageattn_multi_precision
