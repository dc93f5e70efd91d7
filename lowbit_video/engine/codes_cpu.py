"""Codes on a CPU: NumPy's quantisers and its attention; see `codes`."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lowbit_video.kernels.attention import reference as attention
from lowbit_video.kernels.exchange import reference as exchange
from lowbit_video.kernels.exchange.layout import Copy, Layout
from lowbit_video.kernels.formats import get_format, scale_block
from lowbit_video.kernels.quant import reference as quant
from lowbit_video.kernels.variants import KernelVariant

from ..runtime.protocol import Runtime
from .codes_target import Target
from .half import in_half, restored, saturated
from .options import AttentionOptions

DTYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def _heads_first(x: Any, runtime: Runtime) -> np.ndarray:
    return np.ascontiguousarray(runtime.to_numpy(x).transpose(0, 2, 1, 3), dtype=np.float32)


def statistics(q: Any, k: Any, v: Any, options: AttentionOptions, runtime: Runtime) -> Any:
    found, precision = [], options.precision
    if precision.smooth_k:
        found.append(quant.token_mean(_heads_first(k, runtime)))
    if precision.smooth_q:
        found.append(quant.token_mean(_heads_first(q, runtime)))
    if precision.pv == "fp8":
        found.append(quant.v_scale(_heads_first(v, runtime)))
    return runtime.from_numpy(np.stack(found), q, "float32")


def combined(gathered: Any, weights: list[list[float]], means: int, runtime: Runtime) -> Any:
    array = runtime.to_numpy(gathered)
    shares, count, *rest = array.shape
    out = exchange.combine_stats(array.reshape(shares, count, -1), np.array(weights).reshape(means, shares), means)
    return runtime.from_numpy(out.reshape(count, *rest), gathered, "float32")


def encode(x: tuple[Any, Any, Any], found: Any, head: int, layout: Layout, parts: Sequence[str], first: tuple[int, int],
           options: AttentionOptions, runtime: Runtime, memory: Any, begin: int) -> None:
    (q, k, v), precision, array = x, options.precision, runtime.to_numpy(memory).copy()
    heads = slice(head, head + runtime.shape(q)[2])
    rows = [] if found is None else list(runtime.to_numpy(found)[:, :, heads])
    k_mean = rows.pop(0) if rows and precision.smooth_k else None
    q_mean = rows.pop(0) if rows and precision.smooth_q else None
    made: dict[str, np.ndarray] = {}
    if "q_codes" in parts:
        wide = _heads_first(q, runtime)
        made["q_codes"], made["q_scale"] = quant.quantize_rows(wide, precision.q, None, q_mean)
        if "lse_shift" in parts:
            made["lse_shift"] = attention.lse_correction(wide, k_mean, options.scale)
    if "k_codes" in parts:
        wide, values = _heads_first(k, runtime), _heads_first(v, runtime)
        block = scale_block("k", precision.granularity)
        made["k_codes"], made["k_scale"] = quant.quantize_rows(wide, precision.k, block, k_mean)
        if precision.smooth_q:
            made["bias"] = quant.score_bias(q_mean, wide, k_mean)
        made["v"] = (quant.quantize_v(values, rows[0])[0] if precision.pv == "fp8"
                     else values.astype(DTYPES.get(layout.kind.v_dtype, np.float32)))
    for name in parts:
        part = layout.parts[name]
        tokens = runtime.shape(q if part.of == "q" else k)[1]
        after = part.row_bytes(first[part.of == "kv"])
        whole = exchange.part_of(array[begin:], layout, name)[..., after:after + part.row_bytes(tokens)]
        whole[...] = np.ascontiguousarray(made[name]).view(np.uint8).reshape(whole.shape)
    memory[:] = runtime.from_numpy(array, memory, "uint8")


def copy_parts(sources: Sequence[Any], target: Any, copies: Sequence[Copy], batch: int, heads: int, runtime: Runtime) -> None:
    memory = _bytes(target, runtime).copy()
    exchange.copy_parts([_bytes(one, runtime) for one in sources], memory, copies, batch, heads)
    flat = runtime.view(runtime.from_numpy(memory, target, "uint8"), runtime.dtype_name(target))
    target[:] = flat.reshape(list(runtime.shape(target)))


def _bytes(x: Any, runtime: Runtime) -> np.ndarray:
    """A contiguous tensor's memory, as uint8 [bytes]."""
    dtype = runtime.dtype_name(x)
    with np.errstate(invalid="ignore"):  # memory that nobody has written yet may be anything
        return np.ascontiguousarray(runtime.to_numpy(x)).astype(DTYPES.get(dtype, dtype), copy=False).reshape(-1).view(np.uint8)


def attend(codes: Any, variant: KernelVariant, runtime: Runtime, is_causal: bool, return_lse: bool, target: Target) -> Any:
    """variant: unused, there is one on a CPU."""
    q, kv, precision = codes.q, codes.kv, codes.options.precision
    (batch, heads), dim = q.layout.order, q.layout.kind.head_dim
    q_part = lambda name: _read(runtime.to_numpy(q.memory)[q.begin:], q.layout, name)
    kv_part = lambda name: _read(runtime.to_numpy(kv.memory)[kv.begin:], kv.layout, name)
    values = kv_part("v").reshape((batch, heads, dim, -1) if precision.pv == "fp8" else (batch, heads, -1, dim))
    half, exponent = "bf16" if codes.dtype == "bfloat16" else "fp16", None
    if precision.pv == "fp16":
        values = values.astype(np.float32)
        if codes.dtype == "float32":
            values, half, exponent = in_half(values)
    name_of = {"q_codes": precision.q, "k_codes": precision.k}
    stored = lambda part, name: part(name).reshape(batch, heads, -1, dim // get_format(name_of[name]).codes_per_byte)
    rows = lambda part, name: part(name).reshape(batch, heads, -1)
    out, lse = attention.attend_codes(
        stored(q_part, "q_codes"), rows(q_part, "q_scale"), stored(kv_part, "k_codes"), rows(kv_part, "k_scale"), values,
        None if codes.v_scale is None else runtime.to_numpy(codes.v_scale), q_format=precision.q, k_format=precision.k,
        pv_format=precision.pv, block_k=scale_block("k", precision.granularity),
        bias=rows(kv_part, "bias") if precision.smooth_q else None, half=half, scale=codes.options.scale, causal=is_causal)
    if return_lse and "lse_shift" in q.layout.parts:
        lse = lse + rows(q_part, "lse_shift")
    _write(target, saturated(restored(out, exponent), codes.dtype), runtime)
    return runtime.from_numpy(lse, q.memory, "float32") if return_lse else None


def _write(target: Target, out: np.ndarray, runtime: Runtime) -> None:
    """out [outer, inner, N, D] to its place."""
    dtype = runtime.dtype_name(target.tensor)
    whole = np.ascontiguousarray(runtime.to_numpy(target.tensor)).copy()
    size = 4 if dtype == "float32" else 2
    flat, strides = whole.reshape(-1)[target.begin // size:], (*target.strides, 1)
    last = sum((count - 1) * stride for count, stride in zip(out.shape, strides))
    assert not out.size or last < flat.size, "a target reaches past its tensor"
    view = np.lib.stride_tricks.as_strided(flat, out.shape, tuple(stride * flat.itemsize for stride in strides))
    view[...] = out
    target.tensor[:] = runtime.from_numpy(whole, target.tensor, dtype)


def _read(memory: np.ndarray, layout: Layout, name: str) -> np.ndarray:
    """A part's values [outer, inner, rows, elements], in the layout's order."""
    part = exchange.part_of(memory, layout, name)
    part = np.ascontiguousarray(part.swapaxes(0, 1) if layout.heads_first else part)
    return part.view(DTYPES.get(layout.parts[name].dtype, layout.parts[name].dtype))


def merge(out: Any, lse: Any, part: Any, part_lse: Any, runtime: Runtime, tokens_first: bool, dtype: str) -> tuple[Any, Any]:
    order = (1, 2, 0, 3) if tokens_first else (0, 2, 1, 3)
    arrays = [runtime.to_numpy(x).transpose(order) for x in (out, part)]
    merged, both = exchange.merge(arrays, [runtime.to_numpy(lse), runtime.to_numpy(part_lse)])
    back = (2, 0, 1, 3) if tokens_first else (0, 2, 1, 3)
    return runtime.from_numpy(merged.transpose(back), out, dtype), runtime.from_numpy(both, lse, "float32")
