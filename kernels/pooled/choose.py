"""The choice of key tiles: scores of the error that pooling makes, then of each query tile the largest of them as a list.

No sort: the least score that is still chosen is found bit by bit, and ties at it go to the first tiles, so that every list has
exactly as many tiles as were asked for.
"""
from __future__ import annotations

from collections.abc import Sequence

from ..buffers import Buffer
from ..formats import LOG2_E, MIN_MAGNITUDE
from ..language import tl, triton
from ..launch import launch
from ..quant.shapes import ceil_div
from .tiles import KEY_TILE, always_tiles, kept_tiles, query_tile, runs_of_heads

TINY = tl.constexpr(MIN_MAGNITUDE)
SCORE_ROWS, SCORE_KEYS = 16, 64
"""Query tiles and key tiles that one program scores."""
LIST_ROWS = LIST_WARPS = 1
"""Query tiles that one program makes lists of. One warp, one list: its threads agree without waiting for others."""


@triton.jit(do_not_specialize=["rows", "tiles", "N"])
def score_kernel(q_means, q_squares, keys, k_var, v_spread, scores, rows, tiles, N, factor, GROUP: tl.constexpr,
                 D: tl.constexpr, PAD_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, KEY_TILE: tl.constexpr):
    """ROWS query tiles of one head against KEYS key tiles: log2(weight sqrt(A . var k) spread of v), less a row's term."""
    i_r, i_k, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_hk = i_h // GROUP
    o_r, o_k, o_d = i_r * ROWS + tl.arange(0, ROWS), i_k * KEYS + tl.arange(0, KEYS), tl.arange(0, PAD_D)
    m_d = (o_d < D)[None, :]
    m_q, m_k = (o_r < rows)[:, None] & m_d, (o_k < tiles)[:, None] & m_d
    o_q, o_kd = (i_h * rows + o_r[:, None]) * D + o_d[None, :], (i_hk * tiles + o_k[:, None]) * D + o_d[None, :]
    b_q = tl.load(q_means + o_q, mask=m_q, other=0.0)
    b_k = tl.load(keys + o_kd, mask=m_k, other=0.0).to(tl.float32)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * factor
    b_squares = tl.load(q_squares + o_q, mask=m_q, other=0.0)
    b_var = tl.load(k_var + o_kd, mask=m_k, other=0.0)
    b_spread = tl.dot(b_squares, tl.trans(b_var), input_precision="tf32x3")
    b_v = tl.load(v_spread + i_hk * tiles + o_k, mask=o_k < tiles, other=0.0)
    b_length = tl.maximum(tl.minimum(N - o_k * KEY_TILE, KEY_TILE), 1).to(tl.float32)
    b_s += 0.5 * tl.log2(tl.maximum(b_spread, TINY)) + (tl.log2(b_length) + tl.log2(tl.maximum(b_v, TINY)))[None, :]
    m_s = (o_r < rows)[:, None] & (o_k < tiles)[None, :]
    tl.store(scores + (i_h * rows + o_r[:, None]) * tiles + o_k[None, :], b_s, mask=m_s)


@triton.jit(do_not_specialize=["first_head", "heads", "Hq", "rows", "tiles", "N", "kept", "first_tiles", "always"])
def list_kernel(scores, k_scale, listed, listed_scale, count, first_head, heads, Hq, rows, tiles, N, kept, first_tiles, always,
                GROUP: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, KEY_TILE: tl.constexpr, QUERY_TILE: tl.constexpr,
                SCALES: tl.constexpr):
    """The lists of ROWS query tiles of one head; scores become what pooled keys have added to their scores, -inf if listed."""
    i_b, i_h = tl.program_id(1) // heads, first_head + tl.program_id(1) % heads
    o_r, o_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TILES)
    m_r, m_k = (o_r < rows)[:, None], (o_k < tiles)[None, :]
    m_x = m_r & m_k
    o_list = (i_b.to(tl.int64) * Hq + i_h) * rows + o_r
    o_x = o_list[:, None] * tiles + o_k[None, :]
    b_bits = tl.load(scores + o_x, mask=m_x, other=0.0).to(tl.int32, bitcast=True)
    # as unsigned numbers in the order of the floats; what is chosen in any case above them all
    b_code = (b_bits ^ ((b_bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    m_forced = (o_k < first_tiles)[None, :] | (o_k == tiles - 1)[None, :] | (o_r * QUERY_TILE < always)[:, None]
    m_forced = m_forced & m_k
    b_code = tl.where(m_forced, 4294967295, b_code)
    b_count = tl.maximum(tl.sum(m_forced.to(tl.int32), 1), kept)
    b_least = tl.zeros([ROWS], tl.uint32)
    b_bit = tl.full([ROWS], 2147483648, tl.uint32)
    for _ in range(32):
        b_try = b_least | b_bit
        b_above = tl.sum((m_k & (b_code >= b_try[:, None])).to(tl.int32), 1)
        b_least = tl.where(b_above >= b_count, b_try, b_least)
        b_bit = b_bit >> 1
    m_above = m_k & (b_code > b_least[:, None])
    m_tie = m_k & (b_code == b_least[:, None])
    b_left = b_count - tl.sum(m_above.to(tl.int32), 1)
    m_chosen = m_above | (m_tie & (tl.cumsum(m_tie.to(tl.int32), 1) <= b_left[:, None]))
    b_place = tl.cumsum(m_chosen.to(tl.int32), 1) - 1
    p_place = o_list[:, None] * tiles + b_place
    b_tile = tl.broadcast_to(o_k[None, :], (ROWS, TILES))
    tl.store(listed + p_place, b_tile, mask=m_chosen & m_r)
    if SCALES:
        b_scale = tl.load(k_scale + (i_b.to(tl.int64) * (Hq // GROUP) + i_h // GROUP) * tiles + b_tile, mask=m_x, other=0.0)
        tl.store(listed_scale + p_place, b_scale, mask=m_chosen & m_r)
    tl.store(count + o_list, b_count, mask=o_r < rows)
    b_length = tl.maximum(tl.minimum(N - o_k * KEY_TILE, KEY_TILE), 1).to(tl.float32)
    tl.store(scores + o_x, tl.where(m_chosen, float("-inf"), tl.log2(b_length)[None, :]), mask=m_x)


def launch_scores(*, q_means: Buffer, q_squares: Buffer, keys: Buffer, k_var: Buffer, v_spread: Buffer, scores: Buffer,
                  q_shape: tuple[int, int, int, int], kv_shape: tuple[int, int, int, int], sm_scale: float) -> None:
    """scores float32 [B, Hq, query tiles, key tiles], as `reference.error_scores`, of what `tile_stats` found."""
    batch, q_heads, q_len, head_dim = q_shape
    rows, tiles = ceil_div(q_len, query_tile(head_dim)), ceil_div(kv_shape[2], KEY_TILE)
    launch(score_kernel, (ceil_div(rows, SCORE_ROWS), ceil_div(tiles, SCORE_KEYS), batch * q_heads), q_means, q_squares, keys,
           k_var, v_spread, scores, rows, tiles, kv_shape[2], float(sm_scale * LOG2_E), GROUP=q_heads // kv_shape[1],
           D=head_dim, PAD_D=max(16, triton.next_power_of_2(head_dim)), ROWS=SCORE_ROWS, KEYS=SCORE_KEYS, KEY_TILE=KEY_TILE,
           num_warps=8)


def launch_lists(*, scores: Buffer, k_scale: Buffer, tiles: Buffer, scale: Buffer | None, count: Buffer,
                 q_shape: tuple[int, int, int, int], kv_shape: tuple[int, int, int, int], keep: Sequence[float], always: int
                 ) -> None:
    """The lists that `operands.Listed` tells of, by `reference.choose`; scores become the pooled keys' bias, -inf if listed.

    keep: a share for each query head; neighbours with the same share are one launch. k_scale: of K's codes, [B, Hkv, key
    tiles] where scale is given.
    """
    batch, q_heads, q_len, head_dim = q_shape
    rows, all_tiles = ceil_div(q_len, query_tile(head_dim)), ceil_div(kv_shape[2], KEY_TILE)
    for first, heads, share in runs_of_heads(keep):
        launch(list_kernel, (ceil_div(rows, LIST_ROWS), batch * heads), scores, k_scale, tiles, scale, count, first, heads,
               q_heads, rows, all_tiles, kv_shape[2], kept_tiles(share, all_tiles), always_tiles(always, all_tiles), always,
               GROUP=q_heads // kv_shape[1], TILES=triton.next_power_of_2(all_tiles), ROWS=LIST_ROWS, KEY_TILE=KEY_TILE,
               QUERY_TILE=query_tile(head_dim), SCALES=scale is not None, num_warps=LIST_WARPS)
