"""Means and spreads of the key tiles and of the query tiles: what is pooled, and what the choice is made by.

The pass over K and V takes the place of `quant.token_stats`: K's mean over all tokens and V's absmax come out of it too, so
that pooling reads nothing twice. A second, small pass folds the tiles and leaves the pooled keys less that mean.
"""
from __future__ import annotations

from ..buffers import Buffer
from ..formats import MIN_MAGNITUDE, get_format
from ..language import tl, triton
from ..launch import launch
from ..operands import Operand
from ..quant.shapes import ceil_div
from .tiles import KEY_TILE, query_tile

FP8_MAX = tl.constexpr(get_format("fp8").max_code)
TINY = tl.constexpr(MIN_MAGNITUDE)
FOLD = 64
"""Tiles that the second pass reads at once."""
QUERY_ROWS = 64
"""Rows of a query tile that are read at once."""


@triton.jit(do_not_specialize=["H", "N"])
def key_tiles_kernel(k, v, means, k_var, values, v_spread, v_absmax, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h,
                     v_stride_n, H, N, D: tl.constexpr, PAD_D: tl.constexpr, ROWS: tl.constexpr, ABSMAX: tl.constexpr):
    """Tile i_t of one head of K and V: K's mean and variance [D], V's mean and absmax [D] and the spread of its channels."""
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_t * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, PAD_D)
    m_d = o_d < D
    m_x = (o_n < N)[:, None] & m_d[None, :]
    n = tl.minimum(N - i_t * ROWS, ROWS).to(tl.float32)
    i_tile = (i_b.to(tl.int64) * H + i_h) * tl.num_programs(0) + i_t
    p_k = k + i_b.to(tl.int64) * k_stride_b + i_h.to(tl.int64) * k_stride_h
    b_k = tl.load(p_k + o_n.to(tl.int64)[:, None] * k_stride_n + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_k, 0) / n
    b_rest = tl.where(m_x, b_k - b_mean[None, :], 0.0)
    tl.store(means + i_tile * D + o_d, b_mean, mask=m_d)
    tl.store(k_var + i_tile * D + o_d, tl.sum(b_rest * b_rest, 0) / n, mask=m_d)
    p_v = v + i_b.to(tl.int64) * v_stride_b + i_h.to(tl.int64) * v_stride_h
    b_v = tl.load(p_v + o_n.to(tl.int64)[:, None] * v_stride_n + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_v, 0) / n
    b_rest = tl.where(m_x, b_v - b_mean[None, :], 0.0)
    tl.store(values + i_tile * D + o_d, b_mean.to(values.dtype.element_ty), mask=m_d)
    tl.store(v_spread + i_tile, tl.sqrt(tl.sum(tl.sum(b_rest * b_rest, 0) / n, 0)))
    if ABSMAX:
        tl.store(v_absmax + i_tile * D + o_d, tl.max(tl.abs(b_v), 0), mask=m_d)


@triton.jit(do_not_specialize=["N", "tiles"])
def fold_tiles_kernel(means, v_absmax, k_mean, v_scale, keys, N, tiles, D: tl.constexpr, PAD_D: tl.constexpr,
                      ROWS: tl.constexpr, FOLD: tl.constexpr, SMOOTH: tl.constexpr, ABSMAX: tl.constexpr):
    """Of one head: k_mean [D] and v_scale [D] from its tiles, and the pooled keys [tiles, D], means less k_mean."""
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, PAD_D)
    m_d = o_d < D
    o_tiles = i_r * tiles * D
    b_sum = tl.zeros([FOLD, PAD_D], tl.float32)
    b_max = tl.zeros([FOLD, PAD_D], tl.float32)
    for i_t in range(0, tiles, FOLD):
        o_t = i_t + tl.arange(0, FOLD)
        m_t = (o_t < tiles)[:, None] & m_d[None, :]
        o_x = o_tiles + o_t[:, None] * D + o_d[None, :]
        if SMOOTH:
            b_sum += tl.load(means + o_x, mask=m_t, other=0.0) * tl.minimum(N - o_t * ROWS, ROWS).to(tl.float32)[:, None]
        if ABSMAX:
            b_max = tl.maximum(b_max, tl.load(v_absmax + o_x, mask=m_t, other=0.0))
    b_mean = tl.sum(b_sum, 0) / N.to(tl.float32)
    if SMOOTH:
        tl.store(k_mean + i_r * D + o_d, b_mean, mask=m_d)
    if ABSMAX:
        tl.store(v_scale + i_r * D + o_d, tl.maximum(tl.max(b_max, 0), TINY) / FP8_MAX, mask=m_d)
    for i_t in range(0, tiles, FOLD):
        o_t = i_t + tl.arange(0, FOLD)
        m_t = (o_t < tiles)[:, None] & m_d[None, :]
        o_x = o_tiles + o_t[:, None] * D + o_d[None, :]
        b_keys = tl.load(means + o_x, mask=m_t, other=0.0) - b_mean[None, :]
        tl.store(keys + o_x, b_keys.to(keys.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["H", "N"])
def query_tiles_kernel(q, means, squares, stride_b, stride_h, stride_n, H, N, D: tl.constexpr, PAD_D: tl.constexpr,
                       ROWS: tl.constexpr, PART: tl.constexpr):
    """Tile i_t of one head of Q: the mean of its rows [D], and that of their squares [D]."""
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_d = tl.arange(0, PAD_D)
    m_d = o_d < D
    p_q = q + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    b_sum = tl.zeros([PART, PAD_D], tl.float32)
    b_squares = tl.zeros([PART, PAD_D], tl.float32)
    for i_p in tl.static_range(ROWS // PART):
        o_n = i_t * ROWS + i_p * PART + tl.arange(0, PART)
        m_q = (o_n < N)[:, None] & m_d[None, :]
        b_q = tl.load(p_q + o_n.to(tl.int64)[:, None] * stride_n + o_d[None, :], mask=m_q, other=0.0).to(tl.float32)
        b_sum += b_q
        b_squares += b_q * b_q
    n = tl.minimum(N - i_t * ROWS, ROWS).to(tl.float32)
    o_x = ((i_b.to(tl.int64) * H + i_h) * tl.num_programs(0) + i_t) * D + o_d
    tl.store(means + o_x, tl.sum(b_sum, 0) / n, mask=m_d)
    tl.store(squares + o_x, tl.sum(b_squares, 0) / n, mask=m_d)


def launch_key_tiles(k: Operand, v: Operand, *, means: Buffer, keys: Buffer, k_var: Buffer, values: Buffer, v_spread: Buffer,
                     k_mean: Buffer | None = None, v_absmax: Buffer | None = None, v_scale: Buffer | None = None) -> None:
    """What is known of the key tiles of k and v [B, Hkv, N, D]; contiguous, float32 but for keys and values (any float dtype).

    means: scratch [B, Hkv, tiles, D]. keys, values: of each tile, keys less k_mean. k_var [B, Hkv, tiles, D]; v_spread
    [B, Hkv, tiles], the root of the variances' sum over channels. k_mean [B, Hkv, D] over all tokens, None: not subtracted.
    v_scale [B, Hkv, D]: absmax / 448 by way of v_absmax, scratch [B, Hkv, tiles, D]; None where V stays as it is.
    """
    batch, heads, tokens, head_dim = k.shape
    tiles, pad_d = ceil_div(tokens, KEY_TILE), triton.next_power_of_2(head_dim)
    absmax = v_scale is not None
    launch(key_tiles_kernel, (tiles, heads, batch), k.buffer, v.buffer, means, k_var, values, v_spread, v_absmax, *k.strides,
           *v.strides, heads, tokens, D=head_dim, PAD_D=pad_d, ROWS=KEY_TILE, ABSMAX=absmax,
           num_warps=4 if head_dim <= 64 else 8)
    launch(fold_tiles_kernel, (batch * heads,), means, v_absmax, k_mean, v_scale, keys, tokens, tiles, D=head_dim, PAD_D=pad_d,
           ROWS=KEY_TILE, FOLD=FOLD, SMOOTH=k_mean is not None, ABSMAX=absmax, num_warps=8)


def launch_query_tiles(q: Operand, *, means: Buffer, squares: Buffer) -> None:
    """Mean of each query tile's rows, and of their squares: float32 [B, Hq, tiles, D], of q [B, Hq, N, D]."""
    batch, heads, tokens, head_dim = q.shape
    rows = query_tile(head_dim)
    launch(query_tiles_kernel, (ceil_div(tokens, rows), heads, batch), q.buffer, means, squares, *q.strides, heads, tokens,
           D=head_dim, PAD_D=triton.next_power_of_2(head_dim), ROWS=rows, PART=QUERY_ROWS, num_warps=4)
