"""Norms and positions by the framework, of steps alone: for a graph's operator whose call the fused kernels do not serve."""
from __future__ import annotations

from typing import Any

from lowbit_video.kernels.prologue.steps import Norm, Steps

from ...runtime.protocol import Runtime
from .rotary import rotated


def prepared(runtime: Runtime, steps: Steps, q: Any, k: Any) -> tuple[Any, Any]:
    """q and k [B, N, H, D] behind their steps, by the framework's operations."""
    return tuple(_positioned(runtime, steps, x if norm is None else _normed(x, norm))
                 for x, norm in ((q, steps.q_norm), (k, steps.k_norm)))


def _normed(x: Any, norm: Norm) -> Any:
    wide = x.float()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    if norm.rounds_first:
        wide = wide.to(x.dtype).float()
    if norm.weight is not None:
        wide = wide * norm.weight.float()
    if norm.bias is not None:
        wide = wide + norm.bias.float()
    return wide.to(x.dtype)


def _positioned(runtime: Runtime, steps: Steps, x: Any) -> Any:
    if steps.rotary is None:
        return x
    cos, sin, begin, tokens = steps.rotary
    end = begin + tokens
    return runtime.concat([x[:, :begin], rotated(runtime, x[:, begin:end], (cos, sin)), x[:, end:]], 1)
