"""`warmup()`: compiles the kernels that a model's shapes will need, before the first frame waits for them."""
from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from lowbit_video.attention import run
from lowbit_video.precision import Precision
from lowbit_video.runtime import cuda_driver, detect


def warmup(shapes: Iterable[tuple[int, int, int, int]], precision: str | Precision = "int8+fp16", *, dtype: str = "float16",
           framework: str | None = None, device: str = "auto", is_causal: bool = False, return_lse: bool = False,
           kv_heads: int | None = None, backend: str = "auto") -> dict[tuple[int, int, int, int], float]:
    """Runs attention once per shape on unwritten tensors, so that Triton compiles its kernels (and caches them on disk).

    shapes: (batch, tokens, heads, head_dim) as the model will call. Triton specialises kernels by properties
        of a shape (such as a length that divides by 16), hence real shapes. dtype: of the tensors.
    framework: "paddle" or "torch"; default the one that is imported, Paddle first. device: "auto" is the GPU if there is one.
    Returns the milliseconds that each shape's first call took beyond its second: compilation and loading. On a CPU nothing
        is compiled and every value is 0.
    Raises as `attention` for what no kernel serves.
    """
    like = detect.anchor(framework, device)
    runtime = detect.runtime_of(like)
    taken = {}
    for shape in shapes:
        if runtime.is_cpu(like):
            taken[tuple(shape)] = 0.0
            continue
        batch, tokens, heads, head_dim = shape
        q = runtime.empty((batch, tokens, heads, head_dim), dtype, like)
        k, v = (runtime.empty((batch, tokens, kv_heads or heads, head_dim), dtype, like) for _ in "kv")
        first, second = (_wall_ms(runtime, q, k, v, precision, is_causal, return_lse, backend) for _ in range(2))
        taken[tuple(shape)] = max(0.0, first - second)
    return taken


def _wall_ms(runtime: Any, q: Any, k: Any, v: Any, precision: str | Precision, is_causal: bool, return_lse: bool,
             backend: str) -> float:
    stream = runtime.stream(q)
    cuda_driver.synchronize(stream)
    begin = time.perf_counter()
    run(q, k, v, precision, is_causal=is_causal, return_lse=return_lse, backend=backend)
    cuda_driver.synchronize(stream)
    return (time.perf_counter() - begin) * 1e3
