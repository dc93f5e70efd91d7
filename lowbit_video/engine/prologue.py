"""Steps before attention on a call's own tensors: why the fused kernels do not serve them, and the same in NumPy on a CPU."""
from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit_video.kernels.buffers import Buffer, Origin
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
from lowbit_video.kernels.operands import Operand
from lowbit_video.kernels.prologue import reference
from lowbit_video.kernels.prologue.steps import Rest, Steps, mapped
from lowbit_video.kernels.prologue.steps import why_not as why_not_of_shapes
from lowbit_video.kernels.variants import Request

from ..errors import UnsupportedError
from ..precision import Precision
from ..runtime.protocol import Runtime
from .options import AttentionOptions
from .packing import Packing


class NotFused(UnsupportedError):
    """The fused kernels do not serve a call; reason: why, in words."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"norms and positions cannot be fused with quantisation: {reason}; compute them first")
        self.reason = reason


def tensors_of(steps: Steps | None) -> dict[str, Any]:
    """The tensors of the steps, by name."""
    found: dict[str, Any] = {}
    if steps is not None:
        mapped(steps, found.__setitem__)
    return found


def described(steps: Steps) -> Steps:
    """All of the steps but their tensors, which are True: a part of a plan's key."""
    return mapped(steps, lambda name, tensor: True)


def with_buffers(steps: Steps, runtime: Runtime, operand: Callable[[Any, str], Operand]) -> Steps:
    """The steps as launchers take them. operand: of a tensor of q's layout and its name."""
    return mapped(steps, lambda name, tensor: operand(tensor, name) if name.endswith("_rest") else
                  Buffer(tensor.data_ptr(), runtime.dtype_name(tensor), Origin(name)))


def tokens_axis(tensor_layout: str) -> int:
    """Which dimension of a call's tensors counts tokens."""
    return 1 if tensor_layout == "NHD" else 2


def with_rest(shape: tuple[int, ...], steps: Steps | None, tensor_layout: str, runtime: Runtime) -> tuple[int, ...]:
    """The shape of q, k, v or the output with the tokens of a rest, if there is one."""
    if steps is None or steps.rest is None:
        return shape
    axis = tokens_axis(tensor_layout)
    return (*shape[:axis], shape[axis] + runtime.shape(steps.rest.q)[axis], *shape[axis + 1:])


def whole_request(request: Request, steps: Steps | None, tensor_layout: str, runtime: Runtime) -> Request:
    """A request of q, k and v as selection sees it with their rest."""
    if steps is None or steps.rest is None:
        return request
    more = runtime.shape(steps.rest.q)[tokens_axis(tensor_layout)]
    return dataclasses.replace(request, q_len=request.q_len + more, kv_len=request.kv_len + more)


def joined(q: Any, k: Any, v: Any, steps: Steps | None, tensor_layout: str, runtime: Runtime) -> tuple[Any, Any, Any]:
    """q, k and v with their rest behind them, copied; themselves without one."""
    if steps is None or steps.rest is None:
        return q, k, v
    return tuple(runtime.concat(pieces, tokens_axis(tensor_layout)) for pieces in zip((q, k, v), steps.rest))


def why_not_chosen(precision: Precision, pools: bool) -> str | None:
    """Why no call of a precision fuses norms and positions, or None. pools: whether keys are pooled."""
    if precision.exact:
        return "exact attention does not quantise"
    if precision.rotate:
        return "rotation needs each channel's largest value of normed rows first"
    return "pooling needs the means of tiles of normed keys first" if pools else None


def why_not(steps: Steps, q: Any, k: Any, v: Any, options: AttentionOptions, packing: Packing | None, runtime: Runtime
            ) -> str | None:
    """Why norms and positions cannot be fused with a call's quantisation, or None."""
    reason = why_not_chosen(options.precision, options.pools is not None) or ("packed sequences" if packing else None)
    if reason is not None:
        return reason
    if not runtime.is_cpu(q) and importlib.util.find_spec("triton") is None:
        return "Triton is not installed, and these kernels are not among those shipped compiled"
    shapes = [runtime.shape(x) for x in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes) or shapes[1] != shapes[2]:
        return f"q, k and v are {', '.join(str(list(shape)) for shape in shapes)}, and 4 dimensions and one shape are read"
    order = (0, 2, 1, 3) if options.tensor_layout == "NHD" else (0, 1, 2, 3)
    reason = None if steps.rest is None else _why_not_rest(steps.rest, q, options, runtime)
    if reason is not None:
        return reason
    as_read = [tuple(with_rest(shape, steps, options.tensor_layout, runtime)[axis] for axis in order) for shape in shapes]
    return why_not_of_shapes(steps, *as_read[:2], runtime.dtype_name(q)) or why_not_tensors(steps, q, as_read[0][3], runtime)


def _why_not_rest(rest: Rest, q: Any, options: AttentionOptions, runtime: Runtime) -> str | None:
    """Why tokens in two pieces are not read as they lie, or None."""
    if options.precision.pv != "fp8":
        return f"V in {options.precision.pv} is read in one piece by the attention kernel"
    axis, shapes = tokens_axis(options.tensor_layout), [runtime.shape(x) for x in (q, *rest)]
    if any(len(shape) != 4 for shape in shapes) or len({(*shape[:axis], *shape[axis + 1:]) for shape in shapes}) > 1 or (
            len(set(shapes[1:])) > 1):
        return f"the rest of q, k and v is {', '.join(str(list(shape)) for shape in shapes[1:])}, and q is {list(shapes[0])}"
    if 0 in shapes[0] or 0 in shapes[1]:
        return "one of two pieces has no tokens"
    for name, tensor in zip("qkv", rest):
        if runtime.dtype_name(tensor) != runtime.dtype_name(q) or runtime.place(tensor) != runtime.place(q):
            return (f"the rest of {name} is {runtime.dtype_name(tensor)} on {runtime.place(tensor)}, and q "
                    f"{runtime.dtype_name(q)} on {runtime.place(q)}")
        if runtime.strides(tensor)[-1] != 1:
            return f"the last dimension of the rest of {name} is not contiguous"
    return None


def why_not_tensors(steps: Steps, q: Any, head_dim: int, runtime: Runtime) -> str | None:
    """Why the kernels do not read the steps' own tensors for q and k of a head dim, or None; a rest is not looked at."""
    for name, tensor in tensors_of(steps._replace(rest=None)).items():
        table = name in ("cos", "sin")
        shape, dtype = runtime.shape(tensor), runtime.dtype_name(tensor)
        wanted = (steps.rotary.tokens, head_dim) if table else (head_dim,)
        if shape != wanted:
            return f"{name} is {list(shape)}, and {list(wanted)} is read (a norm over all heads is not served)"
        if table and dtype != "float32" or dtype not in FORMAT_OF_DTYPE:
            return f"{name} has dtype {dtype}; {'float32' if table else ', '.join(FORMAT_OF_DTYPE)} is read"
        if runtime.strides(tensor)[-1] != 1 or table and runtime.strides(tensor)[0] != head_dim and shape[0] > 1:
            return f"{name} is not contiguous"
        if runtime.place(tensor) != runtime.place(q):
            return f"{name} is on {runtime.place(tensor)}, and q on {runtime.place(q)}"
    return None


def prepared(q: Any, k: Any, steps: Steps, tensor_layout: str, runtime: Runtime) -> tuple[Any, Any]:
    """q and k as attention takes them, with their rest, by the oracle; on a CPU."""
    arrays, dtype = mapped(steps, lambda name, tensor: runtime.to_numpy(tensor)), runtime.dtype_name(q)
    order = (0, 2, 1, 3) if tensor_layout == "NHD" else (0, 1, 2, 3)  # its own inverse
    rest = arrays.rest or Rest(None, None, None)
    one = lambda x, norm, more: runtime.from_numpy(np.ascontiguousarray(reference.prepared(
        runtime.to_numpy(x).transpose(order), norm, arrays.rotary, dtype,
        None if more is None else more.transpose(order)).transpose(order)), q, dtype)
    return one(q, arrays.q_norm, rest.q), one(k, arrays.k_norm, rest.k)
