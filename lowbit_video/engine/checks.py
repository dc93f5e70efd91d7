"""What must be true of the tensors of a call, and the call as selection sees it."""
from __future__ import annotations

import os
from typing import Any

import numpy as np

from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, FORMATS, LOG2_E, MIN_MAGNITUDE, MIN_SCORE
from lowbit_video.kernels.variants import Request

from ..errors import NonFiniteError, UnsupportedError
from ..runtime.protocol import Runtime
from .options import AttentionOptions
from .packing import Packing

MAX_SCORE = -MIN_SCORE / 10
"""Of a score's magnitude: the running maximum starts at MIN_SCORE."""
MAX_OPERAND = 2.0**-12 / MIN_MAGNITUDE
"""Of an operand's magnitude times scale and head_dim: what lies under MIN_MAGNITUDE in the other then counts for nothing."""


def request_of(q: Any, k: Any, v: Any, options: AttentionOptions, packing: Packing | None, runtime: Runtime) -> Request:
    """The call as selection sees it; raises for shapes and dtypes that no kernel could mean."""
    require_readable(runtime, q=q, k=k, v=v)
    shapes = {name: runtime.shape(t) for name, t in (("q", q), ("k", k), ("v", v))}
    given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    layout = options.tensor_layout
    if packing is not None:
        if any(len(shape) != 3 for shape in shapes.values()):
            raise ValueError(f"q, k and v must be packed as [tokens, heads, head_dim]; given: {given}")
        require_readable(runtime, cu_seqlens_q=packing.cu_q, cu_seqlens_k=packing.cu_k)
        packing.check(runtime)
        require_one_place(runtime, q=q, cu_seqlens_q=packing.cu_q, cu_seqlens_k=packing.cu_k)
        shapes = {name: (1, *shape) for name, shape in shapes.items()}
        given, layout = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()), "NHD"
    if any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(f"q, k and v must have 4 dimensions ({layout}); given: {given}")
    tokens, heads = (1, 2) if layout == "NHD" else (2, 1)
    q_shape, k_shape, v_shape = shapes.values()
    if k_shape != v_shape or q_shape[0] != k_shape[0] or q_shape[3] != k_shape[3]:
        raise ValueError(f"k and v must have one shape, and q's batch and head_dim; given: {given} in {layout}")
    if 0 in q_shape or 0 in k_shape:
        raise ValueError(f"a dimension is zero: attention needs at least one token; given: {given} in {layout}")
    if q_shape[heads] % k_shape[heads]:
        raise ValueError(f"q's heads must be a multiple of k's; given: {q_shape[heads]} and {k_shape[heads]} ({given} in "
                         f"{layout}; is the layout right?)")
    dtypes = {runtime.dtype_name(t) for t in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= set(FORMAT_OF_DTYPE):
        raise TypeError(f"q, k and v must have one dtype out of {', '.join(FORMAT_OF_DTYPE)}; given: "
                        f"{', '.join(runtime.dtype_name(t) for t in (q, k, v))}")
    require_one_place(runtime, q=q, k=k, v=v)
    dtype, cpu, precision = dtypes.pop(), runtime.is_cpu(q), options.precision
    formats = (precision.q, precision.k, precision.pv)
    if precision.exact:
        formats = (FORMAT_OF_DTYPE[dtype] if precision.spec == "exact" else precision.q,) * 3
    pools, size = options.pools, 4 if dtype == "float32" else 2
    if pools is not None:
        pools.of_heads(q_shape[heads])
    return Request(
        "cpu" if cpu else "cuda", runtime.arch(q), *formats, granularity=precision.granularity, dtype=dtype,
        head_dim=q_shape[3], q_len=int(packing.max_q) if packing else q_shape[tokens],
        kv_len=int(packing.max_k) if packing else k_shape[tokens], heads=q_shape[heads], kv_heads=k_shape[heads],
        smooth_q=precision.smooth_q, rotate=precision.rotate, pooled=pools is not None, causal=options.is_causal,
        lse=options.return_lse, varlen=packing is not None, only_if_faster=options.only_if_faster,
        interpret=cpu and os.environ.get("TRITON_INTERPRET") == "1",
        v_aligned=cpu or _aligned(v, runtime, size), qk_aligned=cpu or all(_aligned(x, runtime, size) for x in (q, k)),
        negative=not cpu and precision.exact and options.scaled(q_shape[3]).scale < 0)


def refuse_gradients(runtime: Runtime, *tensors: Any) -> None:
    """Raises UnsupportedError where gradients are asked for: they would be lost without a word."""
    if runtime.wants_gradients(*tensors):
        raise inference_only(runtime.NAME)


def inference_only(framework: str) -> UnsupportedError:
    """The error where gradients are asked for."""
    return UnsupportedError("gradients are asked for, and this attention is inference only\n"
                            f"run it under {framework}.no_grad(), or train through exact attention: a hook with "
                            "fallback='exact', or none")


def require_readable(runtime: Runtime, **tensors: Any) -> None:
    """Raises TypeError for a tensor whose memory cannot be read as it is; Paddle ends the process over a sparse one."""
    for name, tensor in tensors.items():
        reason = runtime.unreadable(tensor)
        if reason is not None:
            raise TypeError(f"{name} is {reason}; supported are dense tensors on the CPU or an NVIDIA GPU: make it one first")


def require_one_place(runtime: Runtime, **tensors: Any) -> None:
    """Raises ValueError unless all tensors are on one device: a kernel would read an address of another one."""
    places = {name: runtime.place(tensor) for name, tensor in tensors.items()}
    if len(set(places.values())) > 1:
        raise ValueError(f"all tensors must be on one device; given: {', '.join(f'{n} on {p}' for n, p in places.items())}")


def _aligned(x: Any, runtime: Runtime, item_size: int) -> bool:
    """Whether TMA can read x: address and strides are multiples of 16 bytes. A last dimension with a stride is copied first."""
    *steps, last = zip(runtime.strides(x), runtime.shape(x))
    return (last[0] != 1 and last[1] > 1) or (
        x.data_ptr() % 16 == 0 and all(stride * item_size % 16 == 0 for stride, length in steps if length > 1))


def check_finite(options: AttentionOptions, runtime: Runtime, **tensors: Any) -> None:
    """`require_finite` and `require_range` of q, k and v [.., D] where the options ask for it: on a CPU unless they say no, on
    a GPU only if they say yes."""
    asked = options.check_finite
    if asked or (asked is None and all(runtime.is_cpu(tensor) for tensor in tensors.values())):
        require_finite(runtime, **tensors)
        scale = options.scaled(runtime.shape(tensors["q"])[-1]).scale
        require_range(scale, *(runtime.to_numpy(tensors[name]) for name in "qkv"))


def require_range(scale: float, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """Raises ValueError for finite values so large that scores or sums may leave what the kernels' float32 softmax holds.

    Bounds, not the scores themselves: of the largest magnitudes. No model comes near them.
    """
    top_q, top_k, top_v = (float(np.abs(x).max(initial=0.0)) for x in (q, k, v))
    dim = q.shape[-1]
    factor = dim * max(1.0, abs(scale) * LOG2_E)
    largest, squares = max(top_q, top_k), dim * (2 * max(top_q, top_k)) ** 2  # INT2's scale is of squares, without the mean
    if factor * largest > MAX_OPERAND or factor * top_q * top_k > MAX_SCORE or squares > FORMATS["fp32"].max_code:
        raise ValueError(f"q reaches {top_q:.3g} and k {top_k:.3g} in magnitude, and scale is {scale:.3g}: "
                         "scores could leave what the kernels' softmax in float32 holds; give smaller values (or "
                         "check_finite=False to go without this check)")
    tokens = v.size // dim
    if top_v * tokens > FORMATS["fp32"].max_code:
        raise ValueError(f"v reaches {top_v:.3g} in magnitude, and its sums over tokens could exceed float32; give smaller "
                         "values (or check_finite=False to go without this check)")


def require_finite(runtime: Runtime, **tensors: Any) -> None:
    """Raises NonFiniteError that names the tensor and counts its NaN and infinite elements."""
    for name, tensor in tensors.items():
        values = runtime.to_numpy(tensor)
        bad = values.size - int(np.count_nonzero(np.isfinite(values)))
        if bad:
            nan = int(np.count_nonzero(np.isnan(values)))
            raise NonFiniteError(f"{name} has {nan} NaN and {bad - nan} infinite elements of {values.size} (shape "
                                 f"{list(values.shape)}); find where they come from, or pass check_finite=False")
