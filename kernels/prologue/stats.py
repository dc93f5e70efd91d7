"""Statistics of K, V and Q over the tokens as `quant.token_stats` has them, K and Q normed and turned on the way.

The first reading of the fused prologue. Each program reduces a tile of tokens of some heads to rows of partials, which
`fold_stats_kernel` folds in a fixed order. Heads of one program share the tile of rotary tables.
"""
from __future__ import annotations

from typing import Any

from ..buffers import Buffer
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand
from ..quant.shapes import ceil_div
from ..quant.token_stats import FOLD, fold_stats_kernel
from .rows import prepared_rows, rotary_tile, rows_of
from .steps import ROWS, Steps

HEADS = 6
"""Heads that share a tile of rotary tables."""


@triton.jit(do_not_specialize=["H", "N", "begin", "turned", "seam"])
def prologue_stats_kernel(q, k, v, partial, q_weight, q_bias, k_weight, k_bias, cos, sin, q_stride_b, q_stride_h, q_stride_n,
                          k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n, q_rest, k_rest, v_rest,
                          q_rest_stride_b, q_rest_stride_h, q_rest_stride_n, k_rest_stride_b, k_rest_stride_h,
                          k_rest_stride_n, v_rest_stride_b, v_rest_stride_h, v_rest_stride_n, seam, eps, H, N, begin, turned,
                          D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
                          ROUNDS_FIRST: tl.constexpr, WITH_Q: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr,
                          INTERPRET: tl.constexpr):
    """Partials [B, H, tiles, D] of Q and K (sums), then of V (largest magnitudes), of what is wanted."""
    i_t, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    ROTARY: tl.constexpr = cos is not None
    o_n = i_t * ROWS + tl.arange(0, ROWS)
    m_n = o_n < N
    o_d = tl.arange(0, D)
    b_cos, b_sin = None, None
    if ROTARY:
        if WITH_Q or WITH_K:
            b_cos, b_sin = rotary_tile(cos, sin, o_n, begin, turned, D, ROWS)
    i_first = tl.program_id(1) * HEADS
    o_next = tl.num_programs(2).to(tl.int64) * H * tl.num_programs(0) * D
    for i_one in range(0, tl.minimum(HEADS, H - i_first)):
        i_h = (i_first + i_one).to(tl.int64)
        p_out = partial + ((i_b * H + i_h) * tl.num_programs(0) + i_t) * D + o_d
        if WITH_Q:
            rest = (q_rest, q_rest_stride_b, q_rest_stride_h, q_rest_stride_n)
            b_x = prepared_rows(q + i_b * q_stride_b + i_h * q_stride_h, q_stride_n, rest, seam, i_b, i_h, o_n, m_n, q_weight,
                                q_bias, eps, b_cos, b_sin, D, ROWS, NORM, ROUNDS_FIRST, ROTARY, INTERPRET)
            tl.store(p_out, tl.sum(b_x, 0))
            p_out += o_next
        if WITH_K:
            rest = (k_rest, k_rest_stride_b, k_rest_stride_h, k_rest_stride_n)
            b_x = prepared_rows(k + i_b * k_stride_b + i_h * k_stride_h, k_stride_n, rest, seam, i_b, i_h, o_n, m_n, k_weight,
                                k_bias, eps, b_cos, b_sin, D, ROWS, NORM, ROUNDS_FIRST, ROTARY, INTERPRET)
            tl.store(p_out, tl.sum(b_x, 0))
            p_out += o_next
        if WITH_V:
            rest = (v_rest, v_rest_stride_b, v_rest_stride_h, v_rest_stride_n)
            b_x = rows_of(v + i_b * v_stride_b + i_h * v_stride_h, v_stride_n, rest, seam, i_b, i_h, o_n, m_n, D)
            tl.store(p_out, tl.max(tl.abs(b_x), 0))


def how_built(steps: Steps, head_dim: int) -> tuple[int, int]:
    """(heads of a program, its warps): of nine builds on an H100 the fastest, or within 17 % of it
    (eval/speed/experiments/prologue.json)."""
    return HEADS if steps.rotary else 1, 4 if head_dim < 64 else 8


def norm_arguments(steps: Steps) -> tuple[list[Buffer | None], dict]:
    """(weights and biases of Q's and K's norm, cos and sin; the constants) of steps whose tensors are buffers."""
    norms, rotary = (steps.q_norm, steps.k_norm), steps.rotary
    buffers = [part for norm in norms for part in (norm and norm.weight, norm and norm.bias)]
    norm = norms[0]
    return ([*buffers, rotary and rotary.cos, rotary and rotary.sin],
            dict(NORM=norm and norm.kind, ROUNDS_FIRST=norm is not None and norm.rounds_first,
                 INTERPRET=bool(triton.knobs.runtime.interpret)))


def scalars(steps: Steps) -> tuple[float, int, int]:
    """(eps, first rotary token, rotary tokens)."""
    rotary = steps.rotary
    return float(steps.q_norm.eps) if steps.q_norm else 0.0, rotary.begin if rotary else 0, rotary.tokens if rotary else 0


def rest_arguments(steps: Steps, shape: tuple[int, ...], which: str) -> list[Any]:
    """Buffers of the rest of each tensor that `which` names, then their strides, and where they begin; all None without a rest.

    shape: of both pieces together.
    """
    if steps.rest is None:
        return [None] * (4 * len(which) + 1)
    given = [getattr(steps.rest, name) for name in which]
    return [*(one.buffer for one in given), *(stride for one in given for stride in one.strides), shape[2] - given[0].shape[2]]


def launch_prologue_stats(q: Operand, k: Operand, v: Operand, steps: Steps, partial: Buffer, *, q_mean: Buffer | None = None,
                          k_mean: Buffer | None = None, v_scale: Buffer | None = None,
                          how: tuple[int, int] | None = None) -> None:
    """Any of q_mean, k_mean and v_scale, float32 [B, H, D], as `token_stats.launch_stats` finds them of normed and turned rows.

    q, k, v: [B, H, N, D] as the projections left them, any strides but of the last dimension; with a rest, N counts its tokens
    too. steps: whose tensors are buffers, its rest's operands, and of which `steps.why_not` is None. partial: `partial_count`
    elements for each statistic. how: heads of a program, its warps.
    """
    batch, heads, tokens, head_dim = k.shape
    together, warps = how or how_built(steps, head_dim)
    tiles = ceil_div(tokens, ROWS)
    flags = dict(WITH_Q=q_mean is not None, WITH_K=k_mean is not None, WITH_V=v_scale is not None)
    buffers, constants = norm_arguments(steps)
    eps, begin, turned = scalars(steps)
    launch(prologue_stats_kernel, (tiles, ceil_div(heads, together), batch), q.buffer, k.buffer, v.buffer, partial, *buffers,
           *q.strides, *k.strides, *v.strides, *rest_arguments(steps, k.shape, "qkv"), eps, heads, tokens, begin, turned,
           D=head_dim, ROWS=ROWS, HEADS=together, **constants, **flags, num_warps=warps)
    rows = batch * heads
    q_rows = rows * flags["WITH_Q"]
    launch(fold_stats_kernel, (sum(flags.values()) * rows,), partial, q_mean, k_mean, v_scale, None, None, q_rows, rows, heads,
           heads, tokens, tokens, tiles, tiles, D=head_dim, PAD_D=head_dim, FOLD=FOLD, VARLEN=False, **flags, num_warps=4)
