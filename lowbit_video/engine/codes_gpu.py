"""Codes on a GPU: the quantisers write them where they are wanted, the attention kernels read them there; see `codes`."""
from __future__ import annotations

import threading
from typing import Any

import numpy as np

from lowbit_video.kernels.buffers import Buffer, as_buffer
from lowbit_video.kernels.exchange.layout import Copy, Layout
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, scale_block
from lowbit_video.kernels.operands import Operand, codes_of, v_codes_of
from lowbit_video.kernels.quant.shapes import partial_shape
from lowbit_video.kernels.variants import KernelVariant

from ..runtime.protocol import Runtime
from .options import AttentionOptions

INTERPRETED_ARCH = (9, 0)
"""What Triton's CPU interpreter plays."""
WORD = 4
"""Bytes that copies are made of."""

_tables: dict[tuple, Any] = {}
_weights: dict[tuple, Any] = {}
_making = threading.Lock()


def _operand(x: Any, runtime: Runtime) -> Operand:
    """A [B, N, H, D] tensor, whose last dimension is contiguous, as launchers take it."""
    batch, tokens, heads, head_dim = runtime.shape(x)
    b, n, h, _ = runtime.strides(x)
    dtype = runtime.dtype_name(x)
    return Operand(Buffer(x.data_ptr(), dtype), (batch, heads, tokens, head_dim), (b, h, n), FORMAT_OF_DTYPE[dtype])


def _rows_contiguous(x: Any, runtime: Runtime) -> Any:
    return x if runtime.strides(x)[-1] == 1 else runtime.contiguous(x)


def _rows(found: Any, options: AttentionOptions) -> dict[str, Buffer]:
    """Where each statistic lies, by name: k_mean, q_mean, v_scale."""
    precision = options.precision
    names = [name for name, there in (("k_mean", precision.smooth_k), ("q_mean", precision.smooth_q),
                                      ("v_scale", precision.pv == "fp8")) if there]
    if not names:
        return {}
    step = int(np.prod(tuple(found.shape)[1:])) * 4
    return {name: Buffer(found.data_ptr() + number * step, "float32") for number, name in enumerate(names)}


def statistics(q: Any, k: Any, v: Any, options: AttentionOptions, runtime: Runtime) -> Any:
    from lowbit_video.kernels.quant import token_stats

    q, k, v = (_rows_contiguous(x, runtime) for x in (q, k, v))
    precision = options.precision
    count = precision.smooth_k + precision.smooth_q + (precision.pv == "fp8")
    batch, _, heads, head_dim = runtime.shape(k)
    found = runtime.empty((count, batch, heads, head_dim), "float32", q)
    rows, wanted, scratch = _rows(found, options), {}, 0
    for name, x, out in (("k", k, "k_mean"), ("q", q, "q_mean"), ("v", v, "v_scale")):
        if out in rows:
            wanted.update({name: _operand(x, runtime), out: rows[out]})
            scratch += int(np.prod(partial_shape(wanted[name].shape)))
    partial = runtime.empty((scratch,), "float32", q)
    with runtime.launch_guard(q):
        token_stats.launch_stats(as_buffer(partial), **wanted)
    return found


def combined(gathered: list[Any], weights: list[list[float]], means: int, runtime: Runtime) -> Any:
    from lowbit_video.kernels.exchange.combine_stats import launch_combine_stats

    first, shares = gathered[0], len(gathered)
    joined = runtime.concat([one.reshape([1, *one.shape]) for one in gathered], 0)
    out = runtime.empty(runtime.shape(first), "float32", first)
    table = _kept(_weights, weights or [[0.0] * shares], first, "float32", runtime)
    statistics = runtime.shape(first)[0]
    with runtime.launch_guard(first):
        launch_combine_stats(as_buffer(joined), as_buffer(table), as_buffer(out), n=int(np.prod(runtime.shape(first)[1:])),
                             shares=shares, means=means, statistics=statistics)
    return out


def encode(q: Any, k: Any, v: Any, found: Any, layout: Layout, options: AttentionOptions, runtime: Runtime) -> Any:
    from lowbit_video.kernels.quant import quant_qk, quant_v

    precision, rows = options.precision, _rows(found, options)
    memory = runtime.empty((layout.size,), "uint8", q)
    place = memory.data_ptr()
    buffer = lambda name: Buffer(place + layout.parts[name].offset, layout.parts[name].dtype)

    def codes(x: Operand, name: str, format: str, scale: str, block: int | None) -> Operand:
        b, h, _ = layout.strides(name)
        return codes_of(x, format, buffer(name), buffer(scale), block)._replace(
            strides=(b, h, 0), scale_strides=_elements(layout, scale))

    with runtime.launch_guard(q):
        if "q_codes" in layout.parts:
            one = _operand(_rows_contiguous(q, runtime), runtime)
            shift = buffer("lse_shift") if "lse_shift" in layout.parts else None
            quant_qk.launch_quant_qk(one, codes(one, "q_codes", precision.q, "q_scale", None), mean=rows.get("q_mean"),
                                     lse_shift=shift, k_mean=rows["k_mean"] if shift else None, sm_scale=options.scale,
                                     token_strides=_elements(layout, "lse_shift") if shift else None)
        if "k_codes" in layout.parts:
            if precision.pv == "fp8":
                one = _operand(_rows_contiguous(v, runtime), runtime)
                quant_v.launch_quant_v(one, v_codes_of(one, buffer("v"), rows["v_scale"])._replace(strides=layout.strides("v")))
            else:
                _copy_rows(v, memory, layout, runtime)
            one = _operand(_rows_contiguous(k, runtime), runtime)
            bias = buffer("bias") if "bias" in layout.parts else None
            quant_qk.launch_quant_qk(
                one, codes(one, "k_codes", precision.k, "k_scale", scale_block("k", precision.granularity)),
                mean=rows.get("k_mean"), bias=bias, q_mean=rows["q_mean"] if bias else None,
                token_strides=_elements(layout, "bias") if bias else None)
    return memory


def _elements(layout: Layout, name: str) -> tuple[int, int]:
    """Strides of batch and head of a float32 part, in elements."""
    b, h, _ = layout.strides(name)
    return b // 4, h // 4


def _copy_rows(v: Any, memory: Any, layout: Layout, runtime: Runtime) -> None:
    """A V that is not quantised, [B, N, H, D], to its part."""
    v = _rows_contiguous(v, runtime)
    batch, tokens, heads, head_dim = runtime.shape(v)
    size = 4 if runtime.dtype_name(v) == "float32" else 2
    b, n, h, _ = (stride * size for stride in runtime.strides(v))
    to_b, to_h, _ = layout.strides("v")
    copy_parts(v, memory, [Copy(0, b, h, n, layout.parts["v"].offset, to_b, to_h, head_dim * size, tokens, head_dim * size)],
               batch, heads, runtime)


def copy_parts(source: Any, target: Any, copies: list[Copy], batch: int, heads: int, runtime: Runtime) -> None:
    from lowbit_video.kernels.exchange.copy_parts import launch_copy_parts

    rows = [[number if name == "rows" else number // WORD for name, number in one._asdict().items()] for one in copies]
    assert all(number % WORD == 0 for one in copies for name, number in one._asdict().items() if name != "rows"), copies
    table = _kept(_tables, rows, source, "int64", runtime)
    with runtime.launch_guard(source):
        launch_copy_parts(Buffer(source.data_ptr(), "int32"), Buffer(target.data_ptr(), "int32"),
                          Buffer(table.data_ptr(), "int64"), copies=len(copies), largest=max(one[-1] * one[-2] for one in rows),
                          batch=batch, heads=heads)


def _kept(known: dict[tuple, Any], rows: list[list], like: Any, dtype: str, runtime: Runtime) -> Any:
    """A small table on `like`'s device; made once, for it depends on shapes alone."""
    key = (runtime.NAME, runtime.place(like), tuple(map(tuple, rows)))
    if key not in known:
        with _making:
            known[key] = runtime.from_numpy(np.array(rows, dtype=dtype), like, dtype)
    return known[key]


def attend(codes: Any, variant: KernelVariant, runtime: Runtime, is_causal: bool, return_lse: bool, out_dtype: str
           ) -> tuple[Any, Any]:
    q_layout, kv_layout, precision = codes.q.layout, codes.kv.layout, codes.options.precision
    batch, heads, head_dim = q_layout.batch, q_layout.heads, q_layout.kind.head_dim
    q_len, kv_len, memory = q_layout.q_len, kv_layout.kv_len, codes.q.memory

    def buffer(of: Any, name: str) -> Buffer | None:
        part = of.layout.parts.get(name)
        return None if part is None else Buffer(of.memory.data_ptr() + of.begin + part.offset, part.dtype)

    shape = lambda tokens: Operand(buffer(codes.q, "q_codes"), (batch, heads, tokens, head_dim), (0, 0, 0), precision.q)
    q = codes_of(shape(q_len), precision.q, buffer(codes.q, "q_codes"), buffer(codes.q, "q_scale"), None)
    k = codes_of(shape(kv_len), precision.k, buffer(codes.kv, "k_codes"), buffer(codes.kv, "k_scale"),
                 scale_block("k", precision.granularity))
    values = buffer(codes.kv, "v")
    if precision.pv == "fp8":
        scale = runtime.contiguous(codes.v_scale)
        v = v_codes_of(shape(kv_len), values, as_buffer(scale))
    else:
        v = Operand(values, (batch, heads, kv_len, head_dim), (heads * kv_len * head_dim, kv_len * head_dim, head_dim),
                    FORMAT_OF_DTYPE[kv_layout.kind.v_dtype])
    out = runtime.empty((q_len, batch, heads, head_dim), out_dtype, memory)
    lse = runtime.empty((batch, heads, q_len), "float32", memory) if return_lse else None
    target = Operand(as_buffer(out), (batch, heads, q_len, head_dim), (heads * head_dim, head_dim, batch * heads * head_dim),
                     FORMAT_OF_DTYPE[out_dtype])
    pv_dtype = "bfloat16" if codes.dtype == "float32" and precision.pv != "fp8" else None
    with runtime.launch_guard(memory):
        variant.load()(q, k, v, target, sm_scale=codes.options.scale, is_causal=is_causal, lse=as_buffer(lse),
                       arch=runtime.arch(memory) or INTERPRETED_ARCH, bias=buffer(codes.kv, "bias"),
                       lse_shift=buffer(codes.q, "lse_shift") if return_lse else None, pv_dtype=pv_dtype)
    return out, lse


def merge(out: Any, lse: Any, part: Any, part_lse: Any, runtime: Runtime, tokens_first: bool, dtype: str) -> tuple[Any, Any]:
    from lowbit_video.kernels.exchange.merge import launch_merge

    batch, heads, tokens = runtime.shape(lse)
    result = out if runtime.dtype_name(out) == dtype else runtime.empty(runtime.shape(out), dtype, out)
    with runtime.launch_guard(out):
        launch_merge(as_buffer(out), as_buffer(lse), as_buffer(part), as_buffer(part_lse), as_buffer(result),
                     shape=(batch, heads, tokens, runtime.shape(out)[-1]), tokens_first=tokens_first)
    return result, lse
