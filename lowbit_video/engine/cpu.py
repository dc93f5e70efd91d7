"""Attention on CPU tensors through a NumPy launcher: the oracle of the kernels, and the CPU backend."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
from lowbit_video.kernels.variants import KernelVariant, Request

from ..runtime.protocol import Runtime
from .half import in_half, restored, saturated
from .options import AttentionOptions
from .packing import Packing


def attend(variant: KernelVariant, request: Request, tensors: tuple[Any, Any, Any], options: AttentionOptions,
           packing: Packing | None, runtime: Runtime, key: tuple | None = None) -> tuple[Any, Any]:
    """(out, lse or None) of checked tensors; packed sequences go one by one. options.scale: a number. key: unused, no plans."""
    q = tensors[0]
    arrays = [runtime.to_numpy(t) for t in tensors]
    if packing is not None:
        begins = packing.beginnings(runtime, arrays[0].shape[0], arrays[1].shape[0])
        out, lse = _one_by_one(variant, request, arrays, options, *begins)
    else:
        if options.tensor_layout == "NHD":
            arrays = [array.transpose(0, 2, 1, 3) for array in arrays]
        out, lse = _attend(variant, request, arrays, options)
        if options.tensor_layout == "NHD":
            out = out.transpose(0, 2, 1, 3)
    return runtime.from_numpy(out, q, request.dtype), runtime.from_numpy(lse, q, "float32") if options.return_lse else None


def _attend(variant: KernelVariant, request: Request, arrays: Iterable[np.ndarray], options: AttentionOptions
            ) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of [B, H, N, D] arrays."""
    q, k, v = (np.asarray(array, dtype=np.float32) for array in arrays)
    half, exponent = "bf16" if request.dtype == "bfloat16" else "fp16", None
    if request.dtype == "float32" and request.pv == "fp16" and not options.precision.exact:
        v, half, exponent = in_half(v)
    pools, more = options.pools, {}
    if pools is not None:
        more = dict(keep=pools.of_heads(q.shape[1]), always=pools.always, pool_format=FORMAT_OF_DTYPE[request.dtype])
    out, lse = variant.load()(q, k, v, q_format=request.q, k_format=request.k, pv_format=request.pv,
                              granularity=request.granularity, smooth_k=options.precision.smooth_k, smooth_q=request.smooth_q,
                              rotate=request.rotate, scale=options.scale, causal=options.is_causal, half=half, **more)
    return saturated(restored(out, exponent), request.dtype), lse


def _one_by_one(variant: KernelVariant, request: Request, arrays: list[np.ndarray], options: AttentionOptions,
                q_begins: np.ndarray, k_begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(out [Tq, H, D], lse [H, Tq]) of packed arrays [T, H, D]; queries whose sequence has no keys give zeros and -inf."""
    q, k, v = arrays
    out = np.zeros(q.shape, np.float32)
    lse = np.full((q.shape[1], q.shape[0]), -np.inf, np.float32)
    for q0, q1, k0, k1 in zip(q_begins[:-1], q_begins[1:], k_begins[:-1], k_begins[1:]):
        if q0 < q1 and k0 < k1:
            one = (array[None].transpose(0, 2, 1, 3) for array in (q[q0:q1], k[k0:k1], v[k0:k1]))
            part, part_lse = _attend(variant, request, one, options)
            out[q0:q1], lse[:, q0:q1] = part[0].transpose(1, 0, 2), part_lse[0]
    return out, lse
