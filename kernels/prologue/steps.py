"""What a model does to Q and K between their projections and attention: a norm over each head's channels, rotary positions.

The steps that the fused kernels know, and why they do not serve others.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..formats import BLOCK_K, FORMAT_OF_DTYPE
from ..quant.shapes import ceil_div

ROWS = BLOCK_K
"""Tokens of a tile, of which each leaves a row of partials: those that share a scale of K."""

HEAD_DIMS = (32, 64, 128)
"""Head dims of the fused kernels: powers of two, of which a tile of 128 rows fits into registers."""
NORMS = ("layer", "rms")


class Norm(NamedTuple):
    """A norm over the head's D channels, computed in float32 and rounded to the tensor's dtype.

    kind: "layer" (mean and variance, biased) or "rms" (mean of squares). eps: added to the variance. weight, bias: [D], any
    float dtype, or None. rounds_first: the value is rounded before it meets the weight too, as diffusers' RMSNorm does.
    """

    kind: str
    eps: float
    weight: Any = None
    bias: Any = None
    rounds_first: bool = False


class Rotary(NamedTuple):
    """Rotary positions of the tokens from `begin` on; those before, and those behind the table's end, stay.

    cos, sin: float32 [tokens, D], contiguous; neighbouring channels share an angle, so only the even ones are read:
    (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin), in float32, rounded to the tensor's dtype.
    """

    cos: Any
    sin: Any
    begin: int
    tokens: int


class Rest(NamedTuple):
    """Q, K and V of the tokens behind those of a call's own q, k and v: another stream's, which lies in memory of its own.

    q, k, v: [B, N of the rest, H, D] in the call's layout, strides of their own; the last dimension is contiguous.
    """

    q: Any
    k: Any
    v: Any


class Steps(NamedTuple):
    """The steps of one attention: norms of Q and of K, of one kind, and positions that both have; None where there is none.

    rest: where the tokens come in two pieces, the second; positions count through both.
    """

    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: Rotary | None = None
    rest: Rest | None = None


def mapped(steps: Steps, change: Callable[[str, Any], Any]) -> Steps:
    """The steps with `change(name, tensor)` in place of each tensor; names are "q_weight", "q_bias", "k_weight", "k_bias",
    "cos", "sin", "q_rest", "k_rest" and "v_rest"."""
    one = lambda name, tensor: None if tensor is None else change(name, tensor)
    norms = [norm and norm._replace(weight=one(f"{of}_weight", norm.weight), bias=one(f"{of}_bias", norm.bias))
             for of, norm in zip("qk", (steps.q_norm, steps.k_norm))]
    rotary, rest = steps.rotary, steps.rest
    return Steps(*norms, rotary and rotary._replace(cos=one("cos", rotary.cos), sin=one("sin", rotary.sin)),
                 rest and Rest(*(one(f"{of}_rest", tensor) for of, tensor in zip("qkv", rest))))


def partial_count(shape: tuple[int, ...]) -> int:
    """Float32 elements of scratch for each tensor [B, H, N, D] of which a statistic is asked."""
    batch, heads, tokens, head_dim = shape
    return batch * heads * ceil_div(tokens, ROWS) * head_dim


def why_not(steps: Steps, q_shape: tuple[int, ...], kv_shape: tuple[int, ...], dtype: str) -> str | None:
    """Why the fused kernels do not serve tensors [B, H, N, D] of such steps, or None where they do; N counts a rest too."""
    heads, tokens, head_dim = q_shape[1:]
    if tuple(q_shape) != tuple(kv_shape):
        return f"q is {list(q_shape)} and k {list(kv_shape)}: one shape is read"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is not among {', '.join(map(str, HEAD_DIMS))}"
    if dtype not in FORMAT_OF_DTYPE:
        return f"dtype {dtype} is not among {', '.join(FORMAT_OF_DTYPE)}"
    norms = steps.q_norm, steps.k_norm
    for norm in norms:
        if norm is not None and norm.kind not in NORMS:
            return f"a norm {norm.kind!r} is not among {', '.join(NORMS)}"
    kinds = {None if norm is None else (norm.kind, norm.eps, norm.weight is None, norm.bias is None, norm.rounds_first)
             for norm in norms}
    if len(kinds) > 1:
        return "q's and k's norms are not of one kind"
    if steps.rotary is not None and not 0 <= steps.rotary.begin <= tokens - steps.rotary.tokens:
        return (f"{steps.rotary.tokens} rotary positions from token {steps.rotary.begin} on do not lie among {tokens} tokens")
    return None
