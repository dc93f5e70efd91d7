"""Codes on a GPU: the quantisers write them where they are wanted, the attention kernels read them there; see `codes`.

Every function's launches depend on shapes and choices alone, so they are replayed after the first time (`replay.again`).
"""
from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.exchange.layout import Copy, Layout
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, scale_block
from lowbit_video.kernels.operands import Operand, codes_of, v_codes_of
from lowbit_video.kernels.quant.shapes import partial_shape
from lowbit_video.kernels.variants import KernelVariant

from ..runtime.protocol import Runtime
from .codes_target import Target
from .options import AttentionOptions
from .replay import again

INTERPRETED_ARCH = (9, 0)
"""What Triton's CPU interpreter plays."""

_tables: dict[tuple, Any] = {}
_making = threading.Lock()


class Given:
    """A [B, N, H, D] tensor whose last dimension is contiguous: what a key and an operand need of it."""

    def __init__(self, x: Any, runtime: Runtime) -> None:
        self.tensor = x if runtime.strides(x)[-1] == 1 else runtime.contiguous(x)
        self.shape, self.strides = runtime.shape(self.tensor), runtime.strides(self.tensor)
        self.dtype = runtime.dtype_name(x)
        self.key = (self.shape, self.strides, self.dtype)

    def operand(self, buffer: Buffer) -> Operand:
        batch, tokens, heads, head_dim = self.shape
        b, n, h, _ = self.strides
        return Operand(buffer, (batch, heads, tokens, head_dim), (b, h, n), FORMAT_OF_DTYPE[self.dtype])


def _names(options: AttentionOptions) -> list[str]:
    """The statistics there are, in their order."""
    precision = options.precision
    return [name for name, there in (("k_mean", precision.smooth_k), ("q_mean", precision.smooth_q),
                                     ("v_scale", precision.pv == "fp8")) if there]


def _rows(found: Buffer, options: AttentionOptions, shape: Sequence[int]) -> dict[str, Buffer]:
    """Where each statistic of [statistics, B, H, D] lies, by name."""
    step = math.prod(shape) * 4
    return {name: found.at(number * step, "float32") for number, name in enumerate(_names(options))}


def statistics(q: Any, k: Any, v: Any, options: AttentionOptions, runtime: Runtime) -> Any:
    given = {"q": Given(q, runtime), "k": Given(k, runtime), "v": Given(v, runtime)}
    batch, _, heads, head_dim = given["k"].shape
    names = _names(options)
    found = runtime.empty((len(names), batch, heads, head_dim), "float32", q)
    read = {name[0]: given[name[0]] for name in names}
    scratch = sum(math.prod(partial_shape((batch, heads, one.shape[1], head_dim))) for one in read.values())
    partial = runtime.empty((scratch,), "float32", q)

    def launch(partial: Buffer, found: Buffer, *buffers: Buffer) -> None:
        from lowbit_video.kernels.quant import token_stats

        operands = {name: one.operand(buffer) for (name, one), buffer in zip(read.items(), buffers)}
        token_stats.launch_stats(partial, **operands, **_rows(found, options, (batch, heads, head_dim)))

    again(("statistics", options, *[one.key for one in read.values()]), runtime,
          (partial, found, *[one.tensor for one in read.values()]), launch)
    return found


def combined(gathered: Any, weights: list[list[float]], means: int, runtime: Runtime) -> Any:
    shares, count, *rest = runtime.shape(gathered)
    out = runtime.empty((count, *rest), "float32", gathered)
    table = _kept(weights or [[0.0] * shares], gathered, "float32", runtime)

    def launch(gathered: Buffer, table: Buffer, out: Buffer) -> None:
        from lowbit_video.kernels.exchange.combine_stats import launch_combine_stats

        launch_combine_stats(gathered, table, out, n=math.prod(rest), shares=shares, means=means, statistics=count)

    again(("combined", shares, count, *rest, means), runtime, (gathered, table, out), launch)
    return out


def encode(x: tuple[Any, Any, Any], found: Any, head: int, layout: Layout, parts: Sequence[str], first: tuple[int, int],
           options: AttentionOptions, runtime: Runtime, memory: Any, begin: int) -> None:
    given = [Given(one, runtime) for one in x]
    batch, heads = given[1].shape[0], runtime.shape(found)[2] if found is not None else 0
    head_dim = given[1].shape[3]

    def launch(memory: Buffer, found: Buffer, q: Buffer, k: Buffer, v: Buffer) -> None:
        operands = tuple(one.operand(buffer) for one, buffer in zip(given, (q, k, v)))
        rows = {name: row.at(head * head_dim * 4, "float32")
                for name, row in _rows(found, options, (batch, heads, head_dim)).items()} if heads else {}
        place = lambda name: memory.at(begin + _offset(layout, name, first), layout.parts[name].dtype)
        _encode(operands, place, rows, heads, layout, parts, options)

    key = ("encode", options, layout, parts, first, begin, head, heads, *[one.key for one in given])
    again(key, runtime, (memory, memory if found is None else found, *[one.tensor for one in given]), launch)
    if "v" in parts and options.precision.pv != "fp8":
        _copy_values(given[2], memory, begin + _offset(layout, "v", first), layout, runtime)


def _offset(layout: Layout, name: str, first: tuple[int, int]) -> int:
    """Where the tokens from `first` (of Q, of K and V) on lie in a part."""
    part = layout.parts[name]
    return part.offset + part.row_bytes(first[part.of == "kv"])


def _encode(operands: tuple[Operand, Operand, Operand], place: Callable[[str], Buffer], rows: dict[str, Buffer], heads: int,
            layout: Layout, parts: Sequence[str], options: AttentionOptions) -> None:
    """The quantisers' launches. rows: the statistics from the first head on, of `heads` heads."""
    from lowbit_video.kernels.quant import quant_qk, quant_v

    (q, k, v), precision = operands, options.precision
    more = {"stat_heads": heads or None}

    def codes(x: Operand, name: str, format: str, scale: str, block: int | None) -> Operand:
        b, h, _ = layout.strides(name)
        made = codes_of(x, format, place(name), place(scale), block)
        return made._replace(strides=(b, h, 0), scale_strides=_elements(layout, scale))

    if "q_codes" in parts:
        shift = place("lse_shift") if "lse_shift" in parts else None
        quant_qk.launch_quant_qk(q, codes(q, "q_codes", precision.q, "q_scale", None), mean=rows.get("q_mean"), lse_shift=shift,
                                 k_mean=rows["k_mean"] if shift else None, sm_scale=options.scale,
                                 token_strides=_elements(layout, "lse_shift") if shift else None, **more)
    if "k_codes" in parts:
        if precision.pv == "fp8":
            made = v_codes_of(v, place("v"), rows["v_scale"])
            quant_v.launch_quant_v(v, made._replace(strides=layout.strides("v")), scale_heads=heads or None)
        bias = place("bias") if "bias" in parts else None
        quant_qk.launch_quant_qk(k, codes(k, "k_codes", precision.k, "k_scale", scale_block("k", precision.granularity)),
                                 mean=rows.get("k_mean"), bias=bias, q_mean=rows["q_mean"] if bias else None,
                                 token_strides=_elements(layout, "bias") if bias else None, **more)


def _elements(layout: Layout, name: str) -> tuple[int, int]:
    """Strides of batch and head of a float32 part, in elements."""
    b, h, _ = layout.strides(name)
    return b // 4, h // 4


def _copy_values(v: Given, memory: Any, begin: int, layout: Layout, runtime: Runtime) -> None:
    """A V that is not quantised, [B, N, H, D], to its part, from byte `begin` on."""
    batch, tokens, heads, head_dim = v.shape
    size = 4 if v.dtype == "float32" else 2
    b, n, h, _ = (stride * size for stride in v.strides)
    to_b, to_h, _ = layout.strides("v")
    one = Copy(0, b, h, n, begin, to_b, to_h, head_dim * size, tokens, head_dim * size)
    copy_parts((v.tensor,), memory, (one,), batch, heads, runtime)


def copy_parts(sources: Sequence[Any], target: Any, copies: Sequence[Copy], batch: int, heads: int, runtime: Runtime) -> None:
    from lowbit_video.kernels.exchange.copy_parts import launch_copy_parts, table_of

    copies = tuple(copies)
    rows = _kept_rows.get(copies)
    if rows is None:
        rows = _kept_rows[copies] = table_of(copies)
    table = _kept(rows, target, "int64", runtime, copies)

    def launch(source: Buffer, second: Buffer, target: Buffer, table: Buffer) -> None:
        words = [buffer.at(0, "int32") for buffer in (source, second, target)]
        launch_copy_parts(*words, table.at(0, "int64"), rows, batch=batch, heads=heads)

    again(("copy", copies, batch, heads), runtime, (sources[0], sources[-1], target, table), launch)


_kept_rows: dict[tuple, list[list[int]]] = {}


def _kept(rows: list[list], like: Any, dtype: str, runtime: Runtime, key: tuple | None = None) -> Any:
    """A small table on `like`'s device; made once, for it depends on shapes alone."""
    full = (runtime.NAME, runtime.place(like), key or tuple(map(tuple, rows)))
    if full not in _tables:
        with _making:
            _tables[full] = runtime.from_numpy(np.array(rows, dtype=dtype), like, dtype)
    return _tables[full]


def attend(codes: Any, variant: KernelVariant, runtime: Runtime, is_causal: bool, return_lse: bool, target: Target
           ) -> Any:
    q_layout, kv_layout, options = codes.q.layout, codes.kv.layout, codes.options
    (batch, heads), q_len, memory = q_layout.order, q_layout.q_len, codes.q.memory
    lse = runtime.empty((batch, heads, q_len), "float32", memory) if return_lse else None
    scale = memory if codes.v_scale is None else runtime.contiguous(codes.v_scale)
    arch = runtime.arch(memory) or INTERPRETED_ARCH
    out_dtype, (out, begin, strides) = runtime.dtype_name(target.tensor), target

    def launch(q: Buffer, kv: Buffer, out: Buffer, lse: Buffer, scale: Buffer) -> None:
        part = lambda base, begin, layout, name: base.at(begin + layout.parts[name].offset, layout.parts[name].dtype)
        shape = (batch, heads, q_len, q_layout.kind.head_dim)
        result = Operand(out.at(begin, out_dtype), shape, strides, FORMAT_OF_DTYPE[out_dtype])
        _attend(variant, result, kv_layout, lambda name: part(q, codes.q.begin, q_layout, name),
                lambda name: part(kv, codes.kv.begin, kv_layout, name), lse if return_lse else None, scale, options, is_causal,
                arch, "lse_shift" in q_layout.parts)

    key = ("attend", variant.name, options, q_layout, kv_layout, codes.q.begin, codes.kv.begin, is_causal, return_lse,
           out_dtype, begin, strides)
    again(key, runtime, (memory, codes.kv.memory, out, memory if lse is None else lse, scale), launch)
    return lse


def _attend(variant: KernelVariant, out: Operand, kv_layout: Layout, q_part: Any, kv_part: Any, lse: Buffer | None,
            v_scale: Buffer, options: AttentionOptions, is_causal: bool, arch: tuple[int, int], shifted: bool) -> None:
    """The launch of the attention kernel on parts that `q_part(name)` and `kv_part(name)` give."""
    precision, kind = options.precision, kv_layout.kind
    batch, heads, _, head_dim = out.shape
    kv_len = kv_layout.kv_len
    keys = out._replace(shape=(batch, heads, kv_len, head_dim))
    q = codes_of(out, precision.q, q_part("q_codes"), q_part("q_scale"), None)
    k = codes_of(keys, precision.k, kv_part("k_codes"), kv_part("k_scale"), scale_block("k", precision.granularity))
    if precision.pv == "fp8":
        v = v_codes_of(keys, kv_part("v"), v_scale)
    else:
        v = Operand(kv_part("v"), keys.shape, (heads * kv_len * head_dim, kv_len * head_dim, head_dim),
                    FORMAT_OF_DTYPE[kind.v_dtype])
    variant.load()(q, k, v, out, sm_scale=options.scale, is_causal=is_causal, lse=lse, arch=arch,
                   bias=kv_part("bias") if kind.bias else None,
                   lse_shift=q_part("lse_shift") if lse is not None and shifted else None,
                   pv_dtype="bfloat16" if kind.v_dtype == "float32" and precision.pv != "fp8" else None)


def merge(out: Any, lse: Any, part: Any, part_lse: Any, runtime: Runtime, tokens_first: bool, dtype: str) -> tuple[Any, Any]:
    batch, heads, tokens = runtime.shape(lse)
    given = (runtime.dtype_name(out), runtime.dtype_name(part))
    result = out if given[0] == dtype else runtime.empty(runtime.shape(out), dtype, out)
    head_dim = runtime.shape(out)[-1]

    def launch(*buffers: Buffer) -> None:
        from lowbit_video.kernels.exchange.merge import launch_merge

        launch_merge(*buffers, shape=(batch, heads, tokens, head_dim), tokens_first=tokens_first)

    again(("merge", batch, heads, tokens, head_dim, given, dtype, tokens_first), runtime, (out, lse, part, part_lse, result),
          launch)
    return result, lse
