"""One attention call, from tensors and options to the result: replay it, or check, select and launch it."""
from __future__ import annotations

from typing import Any

from lowbit_video.kernels.prologue.steps import Steps
from lowbit_video.kernels.variants import KernelVariant

from ..runtime import detect
from . import cpu, gpu, prologue, replay
from .checks import check_finite, refuse_gradients, request_of
from .options import AttentionOptions
from .packing import Packing
from .select import select, warn_if_slower

ENGINES = {"cpu": cpu.attend, "cuda": gpu.attend}
"""What runs a variant of each device."""


def run(q: Any, k: Any, v: Any, options: AttentionOptions, packing: Packing | None = None, steps: Steps | None = None
        ) -> tuple[Any, Any, KernelVariant]:
    """(out, lse or None, the variant that ran) of q, k, v as `lowbit_video.attention` takes them.

    With `packing` they are [tokens, heads, head_dim], as `lowbit_video.attention_varlen` takes them. Inference only.
    steps: of tensors, what is done to q and k first, in the same readings as quantisation; with a rest, out has the tokens of
    q and then the rest's. Raises NotFused where the fused kernels do not serve it.
    """
    if packing is None:
        tensors, lengths = (q, k, v), None
        runtime = detect.same_runtime(q=q, k=k, v=v)
    else:
        tensors, lengths = (q, k, v, packing.cu_q, packing.cu_k), (packing.max_q, packing.max_k)
        runtime = detect.same_runtime(q=q, k=k, v=v, cu_seqlens_q=packing.cu_q, cu_seqlens_k=packing.cu_k)
    beside = tuple(prologue.tensors_of(steps).values())
    key = replay.key_of(runtime, tensors + beside, options, lengths)
    if steps is not None and key is not None:
        key += (prologue.described(steps),)
    plan = None if runtime.wants_gradients(q, k, v, *beside) else replay.find(key)
    if plan is not None and (result := plan.run(runtime, tensors + beside)) is not None:
        return (*result, plan.variant)
    if steps is not None:
        reason = prologue.why_not(steps, q, k, v, options, packing, runtime)
        if reason is not None:
            raise prologue.NotFused(reason)
    request = prologue.whole_request(request_of(q, k, v, options, packing, runtime), steps, options.tensor_layout, runtime)
    variant = select(request, options.backend)
    refuse_gradients(runtime, q, k, v, *beside)
    warn_if_slower(variant, request)
    more = {} if steps is None else {"steps": steps}
    if more and variant.device == "cpu":
        *_, v = prologue.joined(q, k, v, steps, options.tensor_layout, runtime)
        (q, k), more = prologue.prepared(q, k, steps, options.tensor_layout, runtime), {}
    check_finite(options, runtime, q=q, k=k, v=v)
    if more and steps.rest is not None:
        check_finite(options, runtime, **steps.rest._asdict())
    out, lse = ENGINES[variant.device](variant, request, (q, k, v), options.scaled(request.head_dim), packing, runtime, key,
                                      **more)
    return out, lse, variant
