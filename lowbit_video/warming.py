"""`warmup()`: compiles the kernels that a model's shapes will need, before the first frame waits for them."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from .engine.options import options_of
from .engine.packing import Packing
from .engine.run import run
from .precision import Precision
from .runtime import cuda_driver, detect

Shape = tuple[int, int, int, int] | tuple[tuple[int, ...], int, int]
"""(batch, tokens, heads, head_dim), or (lengths, heads, head_dim) of sequences packed for `attention_varlen`."""


def warmup(shapes: Iterable[Shape], precision: str | Precision = "int8+fp16", *, dtype: str = "float16",
           framework: str | None = None, device: str = "auto", is_causal: bool = False, return_lse: bool = False,
           kv_heads: int | None = None, backend: str = "auto") -> dict[Shape, float]:
    """Runs attention once per shape on unwritten tensors, so that Triton compiles its kernels (and caches them on disk).

    shapes: (batch, tokens, heads, head_dim) as the model will call `attention`, or (lengths, heads, head_dim), such as
        ((17776, 226), 30, 64), as it will call `attention_varlen`. Triton specialises kernels by properties of a shape
        (such as a length that divides by 16), hence real shapes. dtype: of the tensors.
    framework: "paddle" or "torch"; default the one that is imported, Paddle first. device: "auto" is the GPU if there is one.
    Returns the milliseconds that each shape's first call took beyond its second: compilation and loading. On a CPU nothing
        is compiled and every value is 0.
    Raises as `attention` for what no kernel serves, ValueError for a shape of neither form.
    """
    like = detect.anchor(framework, device)
    runtime = detect.runtime_of(like)
    taken = {}
    for shape in shapes:
        shape, rows, lengths = _form(shape)
        if runtime.is_cpu(like):
            taken[shape] = 0.0
            continue
        heads, head_dim = shape[-2:]
        q = runtime.empty((*rows, heads, head_dim), dtype, like)
        k, v = (runtime.empty((*rows, kv_heads or heads, head_dim), dtype, like) for _ in "kv")
        options, packing = options_of(precision, "NHD", is_causal, None, return_lse, backend, None), None
        if lengths is not None:
            cu_seqlens = runtime.from_numpy(np.array([0, *accumulate(lengths)], np.int32), like, "int32")
            packing = Packing(cu_seqlens, cu_seqlens, max(lengths), max(lengths))
        call = functools.partial(run, q, k, v, options=options, packing=packing)
        first, second = (_wall_ms(call, runtime.stream(q)) for _ in range(2))
        taken[shape] = max(0.0, first - second)
    return taken


def _form(shape: Shape) -> tuple[Shape, tuple[int, ...], tuple[int, ...] | None]:
    """The shape as a key, its dimensions before the heads, and the lengths where it is one of packed sequences."""
    shape = tuple(shape)
    if len(shape) == 4:
        return shape, shape[:2], None
    if len(shape) == 3 and isinstance(shape[0], Sequence) and len(shape[0]):
        lengths = tuple(shape[0])
        return (lengths, *shape[1:]), (sum(lengths),), lengths
    raise ValueError("a shape is (batch, tokens, heads, head_dim), or (lengths, heads, head_dim) such as ((226, 1000), 30, 64) "
                     f"for attention_varlen; given: {shape}")


def _wall_ms(call: Callable[[], Any], stream: int) -> float:
    cuda_driver.synchronize(stream)
    begin = time.perf_counter()
    call()
    cuda_driver.synchronize(stream)
    return (time.perf_counter() - begin) * 1e3
