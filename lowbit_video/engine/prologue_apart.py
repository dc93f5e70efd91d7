"""Norms and positions of q and k by one kernel, for a call that does not quantise them in the same readings."""
from __future__ import annotations

import importlib.util
from typing import Any

from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.prologue.steps import Steps, mapped
from lowbit_video.kernels.prologue.steps import why_not as why_not_of_shapes

from ..runtime.protocol import Runtime
from .codes_gpu import Given
from .prologue import described, tensors_of, why_not_tensors
from .replay import again


def behind_steps(q: Any, k: Any, steps: Steps, runtime: Runtime) -> tuple[Any, Any] | None:
    """q and k [B, N, H, D] behind their steps, in their own dtype and contiguous; None where the kernel does not serve that.

    steps: of tensors, without a rest. Served are GPUs with Triton, inference, and what the fused kernels know.
    """
    beside = tensors_of(steps)
    if not beside or runtime.is_cpu(q) or importlib.util.find_spec("triton") is None:
        return None
    shapes, dtype = [runtime.shape(x) for x in (q, k)], runtime.dtype_name(q)
    if 0 in shapes[0] or dtype != runtime.dtype_name(k) or runtime.wants_gradients(q, k, *beside.values()):
        return None
    heads_first = [(batch, heads, tokens, head_dim) for batch, tokens, heads, head_dim in shapes]
    if why_not_of_shapes(steps, *heads_first, dtype) or why_not_tensors(steps, q, shapes[0][3], runtime):
        return None
    return write_behind_steps(q, k, steps, runtime)


def write_behind_steps(q: Any, k: Any, steps: Steps, runtime: Runtime) -> tuple[Any, Any]:
    """The same of a call that is served."""
    beside = tensors_of(steps)
    given = [Given(x, runtime) for x in (q, k)]
    outs = [Given(runtime.empty(one.shape, one.dtype, q), runtime) for one in given]

    def launch(*buffers: Buffer) -> None:
        from lowbit_video.kernels.prologue.apart import launch_prologue_apart

        operands = [one.operand(buffer) for one, buffer in zip((*given, *outs), buffers)]
        tensors = dict(zip(beside, buffers[len(operands):]))
        launch_prologue_apart(*operands, mapped(steps, lambda name, tensor: tensors[name]))

    key = ("prologue apart", described(steps), *[one.key for one in given], *map(runtime.dtype_name, beside.values()))
    again(key, runtime, (*[one.tensor for one in (*given, *outs)], *beside.values()), launch)
    return outs[0].tensor, outs[1].tensor
