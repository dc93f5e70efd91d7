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


def encode(q: Any, k: Any, v: Any, found: Any, layout: Layout, parts: Sequence[str], options: AttentionOptions,
           runtime: Runtime, into: Any) -> Any:
    precision, memory = options.precision, np.zeros(layout.size, np.uint8) if into is None else runtime.to_numpy(into).copy()
    rows = [] if found is None else list(runtime.to_numpy(found))
    k_mean = rows.pop(0) if rows and precision.smooth_k else None
    q_mean = rows.pop(0) if rows and precision.smooth_q else None
    made: dict[str, np.ndarray] = {}
    if "q_codes" in parts:
        wide = _heads_first(q, runtime)
        made["q_codes"], made["q_scale"] = quant.quantize_rows(wide, precision.q, None, q_mean)
        if "lse_shift" in layout.parts:
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
        part = exchange.part_of(memory, layout, name)
        part[...] = np.ascontiguousarray(made[name]).view(np.uint8).reshape(part.shape)
    if into is None:
        return runtime.from_numpy(memory, q, "uint8")
    into[:] = runtime.from_numpy(memory, q, "uint8")
    return into


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


def attend(codes: Any, variant: KernelVariant, runtime: Runtime, is_causal: bool, return_lse: bool, out_dtype: str,
           tokens_first: bool) -> tuple[Any, Any]:
    """variant: unused, there is one on a CPU."""
    q, kv, precision = codes.q, codes.kv, codes.options.precision
    q_part = lambda name: _read(runtime.to_numpy(q.memory)[q.begin:], q.layout, name)
    kv_part = lambda name: _read(runtime.to_numpy(kv.memory)[kv.begin:], kv.layout, name)
    batch, heads, dim = q.layout.batch, q.layout.heads, q.layout.kind.head_dim
    values = kv_part("v").reshape((batch, heads, dim, -1) if precision.pv == "fp8" else (batch, heads, -1, dim))
    half = "bf16" if codes.dtype == "bfloat16" else "fp16"
    if precision.pv == "fp16":
        values = values.astype(np.float32)
        if codes.dtype == "float32":
            half = "bf16" if np.abs(values).max() > get_format("fp16").max_code else "fp16"
            values = values.astype(DTYPES["bfloat16" if half == "bf16" else "float16"]).astype(np.float32)
    stored = lambda part, name: part(name).reshape(batch, heads, -1, dim // get_format(name_of[name]).codes_per_byte)
    name_of = {"q_codes": precision.q, "k_codes": precision.k}
    rows = lambda part, name: part(name).reshape(batch, heads, -1)
    out, lse = attention.attend_codes(
        stored(q_part, "q_codes"), rows(q_part, "q_scale"), stored(kv_part, "k_codes"), rows(kv_part, "k_scale"), values,
        None if codes.v_scale is None else runtime.to_numpy(codes.v_scale), q_format=precision.q, k_format=precision.k,
        pv_format=precision.pv, block_k=scale_block("k", precision.granularity),
        bias=rows(kv_part, "bias") if precision.smooth_q else None, half=half, scale=codes.options.scale, causal=is_causal)
    if return_lse and "lse_shift" in q.layout.parts:
        lse = lse + rows(q_part, "lse_shift")
    out = runtime.from_numpy(out.transpose((2, 0, 1, 3) if tokens_first else (0, 2, 1, 3)), q.memory, out_dtype)
    return out, runtime.from_numpy(lse, q.memory, "float32") if return_lse else None


def _read(memory: np.ndarray, layout: Layout, name: str) -> np.ndarray:
    """A part's values [B, heads, rows, elements]."""
    part = np.ascontiguousarray(exchange.part_of(memory, layout, name))
    return part.view(DTYPES.get(layout.parts[name].dtype, layout.parts[name].dtype))


def merge(out: Any, lse: Any, part: Any, part_lse: Any, runtime: Runtime, tokens_first: bool, dtype: str) -> tuple[Any, Any]:
    order = (1, 2, 0, 3) if tokens_first else (0, 2, 1, 3)
    arrays = [runtime.to_numpy(x).transpose(order) for x in (out, part)]
    merged, both = exchange.merge(arrays, [runtime.to_numpy(lse), runtime.to_numpy(part_lse)])
    back = (2, 0, 1, 3) if tokens_first else (0, 2, 1, 3)
    return runtime.from_numpy(merged.transpose(back), out, dtype), runtime.from_numpy(both, lse, "float32")
