"""A module's norms and positions as steps that the fused prologue knows, or why they are computed apart."""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lowbit_video.kernels.prologue.steps import Norm, Rotary, Steps

from ..engine.prologue_apart import behind_steps
from ..graph.tracing import traced_by_paddle, traced_by_torch
from ..runtime.protocol import Runtime

_apart = threading.local()

FUSED_PROLOGUE = True
"""Whether low-bit processors fuse norms and positions with quantisation where they can and are told nothing else."""

TWO_PIECES = True
"""Whether those that do read text's and video's projections as two pieces where the kernels can: CogVideoX's hidden states are
not concatenated then (docs/kernels.md)."""

LAYER_NORMS = ("torch.nn.modules.normalization.LayerNorm", "paddle.nn.layer.norm.LayerNorm")
RMS_NORMS = {"torch.nn.modules.normalization.RMSNorm": False, "diffusers.models.normalization.RMSNorm": True}
"""Classes of norms, not their subclasses; of an RMSNorm whether it rounds before it multiplies by the weight too."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_post_hooks")


class Before(NamedTuple):
    """What a frame does to q and k before their attention: as steps, and by the model's modules, `prepare(q, k)`."""

    steps: Steps
    prepare: Callable[[Any, Any], tuple[Any, Any]]


def by_kernel(runtime: Runtime, steps: Steps, prepare: Callable[[Any, Any], tuple[Any, Any]], q: Any, k: Any
              ) -> tuple[Any, Any]:
    """`prepare(q, k)`, by one kernel of this project where that serves the call; outside of graphs."""
    if traced_by_torch(q) or traced_by_paddle(q):
        return prepare(q, k)
    return behind_steps(q, k, steps, runtime) or prepare(q, k)


@contextlib.contextmanager
def apart(reason: str) -> Iterator[None]:
    """Inside, what this thread notes says why norms and positions were computed apart; "" is no reason to say."""
    outer, _apart.reason = apart_text(), f"; prologue apart: {reason}" if reason else ""
    try:
        yield
    finally:
        _apart.reason = outer


def apart_text() -> str:
    """That reason as a note ends; "" where there is none."""
    return getattr(_apart, "reason", "")


def steps_of(runtime: Runtime, norms: tuple[Any, Any], like: Any, rotary: tuple[Any, Any] | None, begin: int) -> Steps | str:
    """The steps of a frame: q's and k's norms (modules or None), then positions (cos, sin), each [tokens, D], from a token on.

    like: q [B, N, H, D]. Returns why they are not those that the fused kernels know, in words, where they are not.
    """
    shape, dtype = runtime.shape(like), runtime.dtype_name(like)
    found = [None if norm is None else _norm_of(norm, shape[3], dtype, runtime) for norm in norms]
    for one in found:
        if isinstance(one, str):
            return one
    if rotary is None:
        return Steps(*found)
    return Steps(*found, Rotary(*rotary, begin, runtime.shape(rotary[0])[0]))


def has_hooks(module: Any) -> bool:
    """Whether something runs around a module's own forward, as offloading of its weights does."""
    return "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in HOOKS)


def _norm_of(module: Any, head_dim: int, dtype: str, runtime: Runtime) -> Norm | str:
    """A module's norm over a head's channels."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in LAYER_NORMS and name not in RMS_NORMS:
        return f"the norm {name} is not among {', '.join((*LAYER_NORMS, *RMS_NORMS))}"
    if has_hooks(module):
        return f"the {kind.__qualname__} has hooks"
    dims = next(tuple(value) for attribute in ("normalized_shape", "_normalized_shape", "dim")
                if (value := getattr(module, attribute, None)) is not None)
    if dims != (head_dim,) and (len(dims) > 1 or head_dim >= 0):  # in a graph it may be unknown: the operator sees the weight's
        return f"the {kind.__qualname__} is over {list(dims)} values, and a head has {head_dim}"
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    rounds_first = RMS_NORMS.get(name, False)
    if rounds_first and weight is not None and runtime.dtype_name(weight) != dtype:
        return f"the {kind.__qualname__}'s weight is {runtime.dtype_name(weight)}, so what it gives is no {dtype}"
    eps = getattr(module, "_epsilon", None) if hasattr(module, "_epsilon") else module.eps
    if eps is None:
        return f"the {kind.__qualname__} has no eps of its own"
    return Norm("layer" if name in LAYER_NORMS else "rms", float(eps), weight, bias, rounds_first)
