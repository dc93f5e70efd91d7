"""`attention()`: low-bit attention on Paddle and torch tensors.

Check the tensors, select a kernel variant, run it. What exists is declared in `kernels/variants.py`; a
variant that does not fit says why, and nothing falls back silently.
"""
from __future__ import annotations

import dataclasses
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
from lowbit_video.kernels.variants import BACKENDS, VARIANTS, KernelVariant, Request

from .engine import replay as plans
from .errors import NonFiniteError, SlowerThanExactWarning, UnsupportedError
from .precision import Precision, as_precision
from .runtime import detect

LAYOUTS = ("NHD", "HND")


def attention(q: Any, k: Any, v: Any, precision: str | Precision = "int8+fp16", tensor_layout: str = "NHD",
              is_causal: bool = False, scale: float | None = None, return_lse: bool = False, backend: str = "auto",
              check_finite: bool | None = None) -> Any:
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
    check_finite: look for NaN and infinity in q, k and v first. Default: on a CPU only, because on a
        GPU the look would wait for the device.
    Returns out in q's layout and dtype, or (out, lse).
    Warns (SlowerThanExactWarning) where a GPU's exact attention is measured to be faster: short sequences.
    Raises UnsupportedError with every variant's reason, NonFiniteError naming tensor and count,
        ValueError or TypeError for shapes, layouts, precisions and dtypes that do not fit.
    Source: SageAttention2 (arXiv 2411.10958); accumulation and packing differ, see kernels/.
    """
    if traced_by_torch(q):
        from .graph import torch_ops as torch_op

        return torch_op.attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, backend, check_finite)
    if traced_by_paddle(q):
        return paddle_call().attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, backend, check_finite)
    out, lse, _ = run(q, k, v, precision, tensor_layout=tensor_layout, is_causal=is_causal, scale=scale,
                      return_lse=return_lse, backend=backend, check_finite=check_finite)
    return (out, lse) if return_lse else out


def _is_torch(q: Any) -> bool:
    return "torch" in sys.modules and isinstance(q, sys.modules["torch"].Tensor)


def traced_by_torch(q: Any) -> bool:
    """Whether torch.compile traces this call."""
    return _is_torch(q) and sys.modules["torch"].compiler.is_compiling()


def traced_by_paddle(q: Any) -> bool:
    """Whether to_static traces this call: its AST mode builds a program, its SOT mode simulates the bytecode."""
    if "paddle" not in sys.modules or _is_torch(q):
        return False
    paddle = sys.modules["paddle"]
    simulated = getattr(paddle.base.dygraph.base, "in_sot_simulation_mode", None)  # not in every version
    return not paddle.in_dynamic_mode() or (simulated is not None and simulated())


def paddle_call() -> Any:
    """The module of Paddle's static operators."""
    name = "lowbit_video.graph.paddle_ops"  # Paddle's tracers follow no import statement
    return sys.modules[name] if name in sys.modules else importlib.import_module(name)


def run(q: Any, k: Any, v: Any, precision: str | Precision, *, tensor_layout: str = "NHD", is_causal: bool = False,
        scale: float | None = None, return_lse: bool = False, backend: str = "auto", check_finite: bool | None = None,
        only_if_faster: bool = False) -> tuple[Any, Any, KernelVariant]:
    """As `attention`, but returns (out, lse or None, the variant that ran).

    only_if_faster: refuse (UnsupportedError) where exact attention is measured to be faster.
    """
    runtime = detect.same_runtime(q=q, k=k, v=v)
    key = None if check_finite else plans.key_of(runtime, (q, k, v), precision, tensor_layout, is_causal, scale, return_lse,
                                                 backend, only_if_faster)
    plan = plans.find(key)
    if plan is not None and (result := plan.run(runtime, (q, k, v))) is not None:
        return (*result, plan.variant)
    precision = as_precision(precision)
    request = make_request(q, k, v, precision, tensor_layout=tensor_layout, is_causal=is_causal, return_lse=return_lse,
                           runtime=runtime, only_if_faster=only_if_faster)
    variant = select(request, backend)
    warn_if_slower(variant, request)
    if check_finite or (check_finite is None and request.device == "cpu"):
        require_finite(runtime, q=q, k=k, v=v)
    scale = request.head_dim ** -0.5 if scale is None else float(scale)
    if variant.backend == "reference":
        out, lse = _run_reference(q, k, v, precision, request, runtime, tensor_layout, scale, return_lse)
        return out, lse, variant
    from .engine.gpu import run_attention

    result = run_attention(variant, precision, q, k, v, runtime=runtime, tensor_layout=tensor_layout,
                           is_causal=is_causal, scale=scale, return_lse=return_lse, key=key)
    out, lse = result if return_lse else (result, None)
    return out, lse, variant


def make_request(q: Any, k: Any, v: Any, precision: Precision, *, tensor_layout: str, is_causal: bool, return_lse: bool,
                 runtime: Any, only_if_faster: bool = False) -> Request:
    """The call as selection sees it; raises for shapes, layouts and dtypes that no kernel could mean."""
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"unknown tensor_layout {tensor_layout!r}; there are: 'NHD' [batch, tokens, heads, head_dim] and "
                         "'HND' [batch, heads, tokens, head_dim]")
    shapes = {name: runtime.shape(t) for name, t in (("q", q), ("k", k), ("v", v))}
    given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    if any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(f"q, k and v must have 4 dimensions ({tensor_layout}); given: {given}")
    tokens, heads = (1, 2) if tensor_layout == "NHD" else (2, 1)
    q_shape, k_shape, v_shape = shapes.values()
    if k_shape != v_shape or q_shape[0] != k_shape[0] or q_shape[3] != k_shape[3]:
        raise ValueError(f"k and v must have one shape, and q's batch and head_dim; given: {given} in {tensor_layout}")
    if 0 in q_shape or 0 in k_shape:
        raise ValueError(f"a dimension is zero: attention needs at least one token; given: {given} in {tensor_layout}")
    if q_shape[heads] % k_shape[heads]:
        raise ValueError(f"q's heads must be a multiple of k's; given: {q_shape[heads]} and {k_shape[heads]} ({given} in "
                         f"{tensor_layout}; is the layout right?)")
    dtypes = {runtime.dtype_name(t) for t in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= set(FORMAT_OF_DTYPE):
        raise TypeError(f"q, k and v must have one dtype out of {', '.join(FORMAT_OF_DTYPE)}; given: "
                        f"{', '.join(runtime.dtype_name(t) for t in (q, k, v))}")
    require_one_place(runtime, q=q, k=k, v=v)
    dtype = dtypes.pop()
    cpu = runtime.is_cpu(q)
    exact = FORMAT_OF_DTYPE[dtype] if precision.spec == "exact" else precision.q
    return Request(
        device="cpu" if cpu else "cuda", arch=runtime.arch(q), q=exact if precision.exact else precision.q,
        k=exact if precision.exact else precision.k, pv=exact if precision.exact else precision.pv,
        granularity=precision.granularity, dtype=dtype, head_dim=q_shape[3], q_len=q_shape[tokens], kv_len=k_shape[tokens],
        heads=q_shape[heads], kv_heads=k_shape[heads], smooth_q=precision.smooth_q, causal=is_causal, lse=return_lse,
        only_if_faster=only_if_faster, interpret=cpu and _interpreted(),
        v_aligned=cpu or _aligned(v, runtime, 4 if dtype == "float32" else 2))


def select(request: Request, backend: str = "auto", variants: Sequence[KernelVariant] = VARIANTS) -> KernelVariant:
    """The first variant of the backend that serves the request.

    Raises UnsupportedError with the reason of every variant that was considered, ValueError for a
    backend that does not exist.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are: {', '.join(BACKENDS)}")
    reasons = []
    for variant in variants:
        if backend == "auto":
            # Under Triton's interpreter the CPU still means NumPy, unless Triton is asked for by name.
            if request.device == "cpu" and variant.device != "cpu":
                reasons.append((variant, "it needs an NVIDIA GPU"))
                continue
        elif variant.backend != backend:
            continue
        reason = variant.why_not(request)
        if reason is None:
            return variant
        reasons.append((variant, reason))
    listing = "\n".join(f"  {variant.name}: {reason}" for variant, reason in reasons)
    raise UnsupportedError(f"no kernel of backend {backend!r} serves {request}:\n{listing}\n"
                           "try another precision or backend, or fallback='exact' in the processor; "
                           "`lowbit-video kernels` lists what exists")


def warn_if_slower(variant: KernelVariant, request: Request) -> None:
    """Says (SlowerThanExactWarning) that exact attention is measured to be faster at this length than what was asked for."""
    if request.arch is not None:
        reason = variant.why_not(dataclasses.replace(request, only_if_faster=True))
        if reason is not None:
            warnings.warn(f"{variant.name}: {reason}; precision='exact', or fallback='exact' in the processor, takes it",
                          SlowerThanExactWarning, stacklevel=4)


def require_one_place(runtime: Any, **tensors: Any) -> None:
    """Raises ValueError unless all tensors are on one device: a kernel would read an address of another one."""
    places = {name: runtime.place(tensor) for name, tensor in tensors.items()}
    if len(set(places.values())) > 1:
        raise ValueError(f"all tensors must be on one device; given: {', '.join(f'{n} on {p}' for n, p in places.items())}")


def _aligned(x: Any, runtime: Any, item_size: int) -> bool:
    """Whether TMA can read x: address and strides are multiples of 16 bytes. A last dimension with a stride is copied first."""
    *steps, last = zip(runtime.strides(x), runtime.shape(x))
    return (last[0] != 1 and last[1] > 1) or (
        x.data_ptr() % 16 == 0 and all(stride * item_size % 16 == 0 for stride, length in steps if length > 1))


def _interpreted() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


def require_finite(runtime: Any, **tensors: Any) -> None:
    """Raises NonFiniteError that names the tensor and counts its NaN and infinite elements."""
    for name, tensor in tensors.items():
        values = runtime.to_numpy(tensor)
        bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        if bad:
            nan = int(np.count_nonzero(np.isnan(values)))
            raise NonFiniteError(f"{name} has {nan} NaN and {bad - nan} infinite elements of {values.size} (shape "
                                 f"{list(values.shape)}); find where they come from, or pass check_finite=False")


def _run_reference(q: Any, k: Any, v: Any, precision: Precision, request: Request, runtime: Any, tensor_layout: str,
                   scale: float, return_lse: bool) -> tuple[Any, Any]:
    from lowbit_video.kernels.attention import reference

    arrays = [runtime.to_numpy(t) for t in (q, k, v)]
    if tensor_layout == "NHD":
        arrays = [array.transpose(0, 2, 1, 3) for array in arrays]
    arrays = [np.asarray(array, dtype=np.float32) for array in arrays]
    if precision.exact:
        out, lse = reference.attn_fwd(*arrays, scale=scale, causal=request.causal)
    else:
        # float32 tensors are served with P and V in float16, or in bfloat16 where V leaves float16's range.
        wide = request.dtype == "bfloat16" or (request.dtype == "float32" and np.abs(arrays[2]).max() > 65504.0)
        half = "bf16" if wide else "fp16"
        if request.dtype == "float32" and precision.pv == "fp16":
            arrays[2] = _rounded(arrays[2], half)
        out, lse = reference.lowbit_attention(
            *arrays, q_format=precision.q, k_format=precision.k, pv_format=precision.pv, granularity=precision.granularity,
            smooth_k=precision.smooth_k, smooth_q=precision.smooth_q, scale=scale, causal=request.causal, half=half)
    if tensor_layout == "NHD":
        out = out.transpose(0, 2, 1, 3)
    lse = runtime.from_numpy(lse, q, "float32") if return_lse else None
    return runtime.from_numpy(out, q, request.dtype), lse


def _rounded(values: np.ndarray, half: str) -> np.ndarray:
    import ml_dtypes

    return values.astype(np.float16 if half == "fp16" else ml_dtypes.bfloat16).astype(np.float32)
