"""`warmup()`: compiles the kernels that a model's shapes will need, before the first frame waits for them."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import numpy as np

from lowbit_video.kernels.formats import FORMAT_OF_DTYPE

from .arguments import shown, whole
from .engine.options import options_of
from .engine.packing import Packing
from .engine.run import run
from .errors import UnsupportedError
from .hook.recipe.recipe import Recipe
from .pooled import Pooled
from .precision import Precision
from .rung import as_rung
from .runtime import cuda_driver, detect

Shape = tuple[int, int, int, int] | tuple[tuple[int, ...], int, int]
"""(batch, tokens, heads, head_dim), or (lengths, heads, head_dim) of sequences packed for `attention_varlen`."""


def warmup(shapes: Iterable[Shape], precision: str | Precision | Recipe = "int8+fp16", *, dtype: str = "float16",
           framework: str | None = None, device: str = "auto", is_causal: bool = False, return_lse: bool = False,
           kv_heads: int | None = None, backend: str = "auto", pooled: Pooled | None = None) -> dict[Shape, float]:
    """Runs attention once per shape on unwritten tensors, so that Triton compiles its kernels (and caches them on disk).

    shapes: (batch, tokens, heads, head_dim) as the model will call `attention`, or (lengths, heads, head_dim), such as
        ((17776, 226), 30, 64), as it will call `attention_varlen`. Triton specialises kernels by properties of a shape
        (such as a length that divides by 16), hence real shapes. dtype: of the tensors.
    precision: or a recipe, each of whose rungs is run at each shape. Where it gives the heads of a layer several rungs, those
        of one rung are a call of their own: a shape for each number of heads.
    pooled: as `attention` takes it, or in the precision's text, "int8+fp8 pooled 0.3 always 226"; packed sequences have none,
        and a recipe's rungs say it themselves.
    framework: "paddle" or "torch"; default the one that is imported, Paddle first. device: "auto" is the GPU if there is one.
    Returns the milliseconds that each shape's first call took beyond its second, of a recipe those of all rungs: compilation
        and loading. On a CPU nothing is compiled and every value is 0.
    Raises as `attention` for what no kernel serves, ValueError or TypeError for a shape of neither form, a dtype that no kernel
        takes and choices that do not exist, on a CPU too.
    """
    if isinstance(precision, Recipe) and pooled is not None:
        raise ValueError(f"{precision} says how keys are pooled, and pooled={pooled} does too; give one of them")
    rungs = [as_rung(rung, pooled) for rung in (precision.rungs if isinstance(precision, Recipe) else (precision,))]
    choices = [options_of(one, "NHD", is_causal, None, return_lse, backend, None, False, pools) for one, pools in rungs]
    if not isinstance(dtype, str) or dtype not in FORMAT_OF_DTYPE:
        raise ValueError(f"unknown dtype {shown(dtype)}; there are: {', '.join(FORMAT_OF_DTYPE)}")
    try:
        shapes = list(shapes)
    except TypeError:
        raise TypeError(f"shapes is {shown(shapes)}; give a list of shapes") from None
    shapes = [_form(shape) for shape in shapes]
    for options in choices:
        if options.pools is None:
            continue
        if any(lengths is not None for _, _, lengths in shapes):
            raise UnsupportedError("pooled keys are not supported with packed sequences; warm those up without pooled")
        for shape, _, _ in shapes:
            options.pools.of_heads(shape[-2])
    if kv_heads is not None:
        kv_heads = whole("kv_heads", kv_heads, 1)
        uneven = [shape[-2] for shape, _, _ in shapes if shape[-2] % kv_heads]
        if uneven:
            raise ValueError(f"kv_heads is {kv_heads}; heads must be a multiple of it, given: {uneven[0]}")
    like = detect.anchor(framework, device)
    runtime = detect.runtime_of(like)
    taken = {}
    for shape, rows, lengths in shapes:
        if runtime.is_cpu(like):
            taken[shape] = 0.0
            continue
        heads, head_dim = shape[-2:]
        q = runtime.empty((*rows, heads, head_dim), dtype, like)
        k, v = (runtime.empty((*rows, kv_heads or heads, head_dim), dtype, like) for _ in "kv")
        packing = None
        if lengths is not None:
            cu_seqlens = runtime.from_numpy(np.array([0, *accumulate(lengths)], np.int32), like, "int32")
            packing = Packing(cu_seqlens, cu_seqlens, max(lengths), max(lengths))
        taken[shape] = 0.0
        for options in choices:
            call = functools.partial(run, q, k, v, options=options, packing=packing)
            first, second = (_wall_ms(call, runtime.stream(q)) for _ in range(2))
            taken[shape] += max(0.0, first - second)
    return taken


def _form(shape: Shape) -> tuple[Shape, tuple[int, ...], tuple[int, ...] | None]:
    """The shape as a key, its dimensions before the heads, and the lengths where it is one of packed sequences."""
    taken = tuple(shape) if isinstance(shape, (list, tuple)) else ()
    if len(taken) == 4:
        taken = tuple(whole("a number of a shape", number, 1) for number in taken)
        return taken, taken[:2], None
    if len(taken) == 3 and isinstance(taken[0], (list, tuple, range)) and any(taken[0]):
        lengths = tuple(whole("a length of a shape", length, 0) for length in taken[0])
        heads, head_dim = (whole("a number of a shape", number, 1) for number in taken[1:])
        return (lengths, heads, head_dim), (sum(lengths),), lengths
    raise ValueError("a shape is (batch, tokens, heads, head_dim), or (lengths, heads, head_dim) such as ((226, 1000), 30, 64) "
                     f"for attention_varlen; given: {shown(shape)}")


def _wall_ms(call: Callable[[], Any], stream: int) -> float:
    cuda_driver.synchronize(stream)
    begin = time.perf_counter()
    call()
    cuda_driver.synchronize(stream)
    return (time.perf_counter() - begin) * 1e3
