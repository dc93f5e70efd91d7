"""Attention in two halves: `encode` makes codes of Q, K and V, `attend` computes from codes, wherever they were made.

Between the halves the codes can travel, or wait while the originals are freed. Each half has a CPU and a GPU form.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit_video.kernels.exchange.layout import Copy, Kind, Layout
from lowbit_video.kernels.variants import KernelVariant, Request

from ..runtime.protocol import Runtime
from . import codes_cpu, codes_gpu
from .checks import request_of
from .codes_target import Target, new_target
from .options import AttentionOptions
from .select import select


@dataclass(frozen=True)
class Codes:
    """Codes in a piece of memory. memory: uint8 [bytes] tensor; layout: of it, from byte `begin` on."""

    memory: Any
    layout: Layout
    begin: int = 0


@dataclass(frozen=True)
class AttentionCodes:
    """Q, K and V quantised, and all that attention needs beside them; nothing refers to the originals.

    q, kv: where the codes are. v_scale: float32 [B, Hkv, D] of FP8 V, in the layout's order, else None. options: of the call,
    its scale a number.
    dtype: of the originals, and of the output.
    """

    q: Codes
    kv: Codes
    v_scale: Any
    options: AttentionOptions
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and corrections."""
        return self.q.layout.size + self.kv.layout.size


def kind_of(q: Any, options: AttentionOptions, runtime: Runtime) -> Kind:
    """Which parts codes of tensors such as q have."""
    precision = options.precision
    return Kind(runtime.shape(q)[-1], precision.q, precision.k, precision.pv, precision.granularity, runtime.dtype_name(q),
                bias=precision.smooth_q, shift=options.return_lse and precision.smooth_k)


def statistics_of(options: AttentionOptions) -> tuple[int, int]:
    """(means, maxima) that quantisation asks of all tokens: means of K and of Q, then V's scale a channel."""
    precision = options.precision
    return precision.smooth_k + precision.smooth_q, int(precision.pv == "fp8")


def why_no_codes(q: Any, k: Any, v: Any, options: AttentionOptions, runtime: Runtime, q_len: int | None = None,
                 kv_len: int | None = None) -> str | None:
    """Why [B, N, H, D] tensors cannot be attended by codes alone, or None if they can.

    q_len, kv_len: tokens of all, where the tensors are shares of them.
    Raises ValueError or TypeError, as attention does, for tensors that fit no kernel, UnsupportedError where no variant serves.
    """
    if options.precision.exact:
        return "exact attention has no codes"
    if options.precision.rotate:
        return "codes that are rotated need the largest of each channel of all tokens, which is not exchanged"
    if options.pools is not None:
        return "what to pool is chosen by tensors, not by codes"
    request = request_of(q, k, v, options, None, runtime)
    select(replace(request, q_len=q_len or request.q_len, kv_len=kv_len or request.kv_len), options.backend)
    if request.heads != request.kv_heads:
        return "grouped queries"
    if request.head_dim % 16:
        return f"head dim {request.head_dim} is not a multiple of 16"
    return None


def _engine(like: Any, runtime: Runtime) -> Any:
    return codes_cpu if runtime.is_cpu(like) else codes_gpu


def statistics(q: Any, k: Any, v: Any, options: AttentionOptions, runtime: Runtime) -> Any:
    """float32 [statistics, B, H, D] of the tokens of [B, N, H, D] tensors (see `statistics_of`); None where there are none."""
    return _engine(q, runtime).statistics(q, k, v, options, runtime) if sum(statistics_of(options)) else None


def combined(gathered: Any, q_counts: list[int], kv_counts: list[int], options: AttentionOptions, runtime: Runtime) -> Any:
    """The statistics of all tokens from those of shares, [shares, ..], with so many tokens each."""
    means, _ = statistics_of(options)
    counts = ([kv_counts] if options.precision.smooth_k else []) + ([q_counts] if options.precision.smooth_q else [])
    weights = [[count / sum(row) for count in row] for row in counts]
    return _engine(gathered, runtime).combined(gathered, weights, means, runtime)


def encode(x: tuple[Any, Any, Any], found: Any, layout: Layout, options: AttentionOptions, runtime: Runtime, *,
           memory: Any = None, begin: int = 0, first: tuple[int, int] = (0, 0), head: int = 0, of: str | None = None) -> Any:
    """Codes of q, k and v [B, N, H, D] as uint8 [bytes] in a layout; parts that it lacks are left out.

    found: statistics of these heads, or of more, of which `head` is the first of these. options.scale: a number.
    memory: where to write, from byte `begin` on; None makes it. first: where these tokens (of Q, of K and V) begin among the
    layout's. of: "q" or "kv" writes those parts alone.
    """
    parts = tuple(name for name, part in layout.parts.items() if of in (None, part.of))
    memory = runtime.empty((layout.size,), "uint8", x[0]) if memory is None else memory
    _engine(memory, runtime).encode(x, found, head, layout, parts, first, options, runtime, memory, begin)
    return memory


def q_needs_statistics(options: AttentionOptions) -> bool:
    """Whether Q's codes, or what lies beside them, depend on statistics of all tokens."""
    return options.precision.smooth_q or (options.return_lse and options.precision.smooth_k)


def v_scale_of(found: Any, options: AttentionOptions, heads: slice = slice(None)) -> Any:
    """V's scales [B, heads, D] among the statistics, or None."""
    return found[-1][:, heads] if options.precision.pv == "fp8" else None


def copy_parts(sources: Sequence[Any], target: Any, copies: Sequence[Copy], batch: int, heads: int, runtime: Runtime) -> None:
    """Does the copies (of `exchange.layout`) from one or two contiguous tensors to another; their offsets are in bytes."""
    _engine(target, runtime).copy_parts(sources, target, copies, batch, heads, runtime)


def variant_of(codes: AttentionCodes, runtime: Runtime, is_causal: bool, return_lse: bool, backend: str) -> KernelVariant:
    """The variant that attends these codes. Raises UnsupportedError where none does."""
    precision, layout, memory = codes.options.precision, codes.q.layout, codes.q.memory
    cpu = runtime.is_cpu(memory)
    return select(Request(
        "cpu" if cpu else "cuda", runtime.arch(memory), precision.q, precision.k, precision.pv,
        granularity=precision.granularity, dtype=codes.dtype, head_dim=layout.kind.head_dim, q_len=layout.q_len,
        kv_len=codes.kv.layout.kv_len, heads=layout.heads, kv_heads=layout.heads, smooth_q=precision.smooth_q, causal=is_causal,
        lse=return_lse, interpret=cpu and os.environ.get("TRITON_INTERPRET") == "1"), backend)


def attend(codes: AttentionCodes, runtime: Runtime, *, is_causal: bool = False, return_lse: bool = False, backend: str = "auto",
           smoothed_lse: bool = False, tokens_first: bool = True, target: Target | None = None
           ) -> tuple[Any, Any, KernelVariant]:
    """(out, lse [B, H, N] or None, the variant that ran); B and H as in the layout's order.

    tokens_first: out is [N, B, H, D], so that a range of tokens is one piece; else [B, N, H, D]. target: where to write
    instead; out is its tensor.
    smoothed_lse: an LSE without what smoothing took from it will do, as it does to merge parts of keys that share one mean.
    Raises UnsupportedError where no variant serves the codes, ValueError for an LSE that they were not made for.
    """
    if return_lse and not smoothed_lse and codes.options.precision.smooth_k and not codes.q.layout.kind.shift:
        raise ValueError("these codes were made without return_lse=True, and K's mean, which the LSE needs, is gone; make them "
                         "with it")
    variant = variant_of(codes, runtime, is_causal, return_lse, backend)
    engine = codes_cpu if variant.device == "cpu" else codes_gpu
    if target is None:
        layout = codes.q.layout
        shape = (*layout.order, layout.q_len, layout.kind.head_dim)
        target = new_target(shape, codes.dtype, tokens_first, codes.q.memory, runtime)
    lse = engine.attend(codes, variant, runtime, is_causal, return_lse, target)
    return target.tensor, lse, variant


def merge(out: Any, lse: Any, part: Any, part_lse: Any, runtime: Runtime, *, tokens_first: bool, dtype: str) -> tuple[Any, Any]:
    """Attention over the keys of two parts, from attention over each; `out` and `lse` may be overwritten.

    out, part: [N, B, H, D] (tokens_first) or [B, N, H, D], contiguous; lse, part_lse: float32 [B, H, N]. dtype: of the result.
    """
    return _engine(out, runtime).merge(out, lse, part, part_lse, runtime, tokens_first, dtype)
