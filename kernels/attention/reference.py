"""NumPy attention forward: the oracle of every kernel, and the CPU backend.

It mirrors the kernels' own numerics: scores from codes, exact in float32; dequantisation fused into the
softmax scale; online softmax in base 2 over key tiles with float32 state; probabilities rounded as the
kernel rounds them; each tile's P.V added in float32. Memory grows with N, not N**2.
Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; SageAttention2 (arXiv 2411.10958) for FP8 P.V.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..blas_threads import one_blas_thread
from ..exchange.reference import merge
from ..formats import BLOCK_K, EXACT_FORMATS, LINE_SHIFT, LN_2, LOG2_E, MIN_SCORE, P_SHIFT, scale_block
from ..pooled import reference as pooled
from ..pooled.tiles import KEY_TILE, query_tile
from ..quant import reference as quant

TILE_Q = 512
"""Query rows handled at once: a [512, 128] float32 tile of scores stays in a core's cache."""

ROUNDING = {"fp16": (11, -14), "bf16": (8, -126), "fp8": (4, -6)}
"""Significant bits, and exponent of the smallest normal number, of each format that P is rounded to."""


def round_significand(x: np.ndarray, bits: int, min_exponent: int) -> np.ndarray:
    """x >= 0 (float32) rounded in place to `bits` significant bits, subnormals below 2**min_exponent included.

    Nearest, half to even. Adding a number `bits` places up pushes the bits below out of float32's 24;
    subnormals borrow the grid of the first normal binade.
    """
    lift = (x < np.float32(2.0**min_exponent)) * np.float32(2.0**min_exponent)
    x += lift
    carry = x * np.float32(2.0 ** (24 - bits) + 1)
    np.subtract(carry, x, out=x)
    np.subtract(carry, x, out=x)
    x -= lift
    return x


def line_probabilities(x: np.ndarray) -> np.ndarray:
    """2**x (float32, up to 8) as the Hopper kernel's `line` makes it: a straight line between e4m3's powers of two.

    The code 8 x + 55.55 is rounded twice, to float16 on the way; what lies under zero is zero.
    """
    half = np.maximum(x + np.float32(LINE_SHIFT), np.float32(0.0)).astype(np.float16)
    code = np.rint(half.astype(np.float32) * np.float32(8.0)).astype(np.int32)
    exponent, mantissa = code >> 3, code & 7
    return np.ldexp((mantissa + 8 * (exponent > 0)).astype(np.float32), np.maximum(exponent, 1) - 10)


@one_blas_thread()
def attn_fwd(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, q_scale: np.ndarray | None = None,
             k_scale: np.ndarray | None = None, v_scale: np.ndarray | None = None, bias: np.ndarray | None = None,
             p_format: str = "fp32", causal: bool = False, block_n: int = BLOCK_K, sum_rounded: bool = False,
             backwards: bool = False, line: int = 0, chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """softmax(q k^T) v over decoded codes.

    q: [B, Hq, Nq, D] float32, k, v: [B, Hkv, Nkv, D] float32: values of the codes without their scales.
    q_scale: [B, Hq, Nq], k_scale: [B, Hkv, Nkv], v_scale: [B, Hkv, D] float32, or None for 1.
    bias: [B, Hq, Nkv] float32 added to every row of the unscaled scores (Q smoothing's correction).
    scale: multiplies the scores. causal: key j is visible to query i if j <= i + Nkv - Nq.
    p_format: what P is rounded to ("fp16", "bf16", "fp8", or "fp32" for not at all); fp8 carries 2**8.
    block_n: keys per tile. sum_rounded: row sums of the rounded P, as kernels that sum by MMA do. backwards: tiles from the
    last to the first, as the Hopper kernel takes them; FP8 P is rounded on the grid of the maximum so far. line (fp8): so many
    of eight registers of P come from `line_probabilities`, as in that kernel: of every 64 keys, two registers to 16 of them,
    one for the first 8 and one for the last 8 of 16 query rows. chosen: bool [B, Hq, query tiles, key tiles], of pooled
    attention: the keys that each query tile sees.
    Returns out [B, Hq, Nq, D] float32 and the natural-log LSE [B, Hq, Nq] of the scores given (not corrected
    for K smoothing). A row that sees no key gives zeros and -inf.
    """
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    out = np.empty((batch, heads, q_len, dim), np.float32)
    lse = np.empty((batch, heads, q_len), np.float32)
    shift = np.float32(P_SHIFT if p_format == "fp8" else 0.0)
    rounding = ROUNDING.get(p_format)
    factor = np.float32(scale * LOG2_E)
    step = TILE_Q if chosen is None else query_tile(dim)
    for i_b in range(batch):
        for i_h in range(heads):
            i_hk = i_h * kv_heads // heads
            keys = np.ascontiguousarray(k[i_b, i_hk].T)  # [D, Nkv]
            values = v[i_b, i_hk]
            for start in range(0, q_len, step):
                rows = slice(start, min(start + step, q_len))
                count = rows.stop - start
                queries = q[i_b, i_h, rows]
                row_scale = np.full((count, 1), factor, np.float32)
                if q_scale is not None:
                    row_scale *= q_scale[i_b, i_h, rows, None]
                last_key = start + np.arange(count)[:, None] + kv_len - q_len  # [rows, 1], inclusive
                row_max = np.full((count, 1), MIN_SCORE, np.float32)
                row_sum = np.zeros((count, 1), np.float32)
                acc = np.zeros((count, dim), np.float32)
                end = max(0, min(kv_len, int(last_key[-1, 0]) + 1)) if causal else kv_len
                tiles = range(0, end, block_n)
                for first in reversed(tiles) if backwards else tiles:
                    if chosen is not None and not chosen[i_b, i_h, start // step, first // KEY_TILE]:
                        continue
                    columns = slice(first, min(first + block_n, kv_len))
                    s = queries @ keys[:, columns]  # [rows, tile]
                    if k_scale is not None:
                        s *= k_scale[i_b, i_hk, columns]
                    s *= row_scale
                    if bias is not None:
                        s += bias[i_b, i_h, columns] * factor
                    masked = causal and columns.stop - 1 > last_key[0, 0]
                    if masked:
                        s[np.arange(first, columns.stop) > last_key] = -np.inf
                    new_max = np.maximum(row_max, s.max(axis=1, keepdims=True))
                    s -= new_max - shift
                    if not masked:  # subnormal results would make exp2 a hundred times slower, and count for nothing
                        np.maximum(s, np.float32(-126.0), out=s)
                    if line:
                        register = np.arange(columns.stop - first) // 16 % 4 * 2 + (start + np.arange(count)[:, None]) // 8 % 2
                        straight = line_probabilities(s)
                    p = np.exp2(s, out=s)
                    alpha = np.exp2(row_max - new_max)
                    row_max = new_max
                    if not sum_rounded:
                        row_sum = row_sum * alpha + p.sum(axis=1, keepdims=True)
                    if rounding is not None:
                        p = round_significand(p, *rounding)
                    if line:
                        p = np.where(register < line, straight, p)
                    if sum_rounded:
                        row_sum = row_sum * alpha + p.sum(axis=1, keepdims=True)
                    acc *= alpha
                    acc += p @ values[columns]
                empty = row_sum == 0.0
                acc /= np.where(empty, np.float32(1.0), row_sum)
                if v_scale is not None:
                    acc *= v_scale[i_b, i_hk]
                out[i_b, i_h, rows] = acc
                with np.errstate(divide="ignore"):
                    lse[i_b, i_h, rows] = ((row_max - shift + np.log2(row_sum)) * np.float32(LN_2))[:, 0]
                lse[i_b, i_h, rows][empty[:, 0]] = -np.inf
    return out, lse


def lowbit_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, q_format: str, k_format: str, pv_format: str,
                     granularity: str = "block", smooth_k: bool = True, smooth_q: bool = False, rotate: bool = False,
                     scale: float, causal: bool = False, half: str = "fp16", block_n: int = BLOCK_K,
                     sum_rounded: bool = False, backwards: bool = False, line: int = 0, keep: Sequence[float] | None = None,
                     always: int = 0, pool_format: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """Quantise and attend, as the GPU backends do it in their separate kernels; the launcher of the CPU's variants.

    q: [B, Hq, Nq, D], k, v: [B, Hkv, Nkv, D] float32 holding the caller's (possibly 16-bit) values.
    q_format: an exact one ("fp16", "bf16", "fp32") quantises nothing and rounds nothing.
    rotate: Q's and K's channels are evened out and rotated first (`quant.rotation`).
    half: "fp16" or "bf16", the 16-bit type of V and P where pv_format is "fp16".
    keep: a share for each query head makes it pooled attention; always: see `pooled.reference.choose`. pool_format: the
    tensors' format, which pooled keys and values are kept in.
    Returns out [B, Hq, Nq, D] float32 and LSE [B, Hq, Nq], corrected for smoothing.
    """
    if q_format in EXACT_FORMATS:
        return attn_fwd(q, k, v, scale=scale, causal=causal)
    block_k = scale_block("k", granularity)
    k_mean = quant.token_mean(k) if smooth_k else None
    q_mean = quant.token_mean(q) if smooth_q else None
    factors = quant.rotation(quant.channel_top(q, q_mean), quant.channel_top(k, k_mean)) if rotate else (None, None)
    q_codes, q_scale = quant.quantize_rows(q, q_format, None, q_mean, factors[0])
    k_codes, k_scale = quant.quantize_rows(k, k_format, block_k, k_mean, factors[1])
    v_codes, v_scale = quant.quantize_v(v) if pv_format == "fp8" else (v, None)
    bias = quant.score_bias(q_mean, k, k_mean) if smooth_q else None
    chosen = None
    if keep is not None:
        stats = pooled.tile_stats(k, v, k_mean, pool_format)
        chosen = pooled.choose(pooled.error_scores(q, stats, scale), keep, always, q.shape[-1])
    out, lse = attend_codes(q_codes, q_scale, k_codes, k_scale, v_codes, v_scale, q_format=q_format, k_format=k_format,
                            pv_format=pv_format, block_k=block_k, bias=bias, half=half, scale=scale, causal=causal,
                            block_n=block_n, sum_rounded=sum_rounded, backwards=backwards, line=line, chosen=chosen)
    if chosen is not None:
        part, part_lse = pooled.pooled_part(q, stats, chosen, scale)
        out, lse = merge((out, part), (lse, part_lse))
    if smooth_k:
        lse += lse_correction(q, k_mean, scale)
    return out, lse


def attend_codes(q_codes: np.ndarray, q_scale: np.ndarray, k_codes: np.ndarray, k_scale: np.ndarray, v: np.ndarray,
                 v_scale: np.ndarray | None, *, q_format: str, k_format: str, pv_format: str, block_k: int | None,
                 bias: np.ndarray | None, half: str, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    """(out, LSE) of stored codes and scales, as `quant.reference` makes them; the LSE is not corrected for smoothing.

    v: V's codes where pv_format is "fp8", else its values [B, Hkv, Nkv, D] float32. how: the rest of `attn_fwd`'s arguments.
    """
    kv_len = k_codes.shape[2]
    values, p_format = (quant.decode_v(v, kv_len), "fp8") if pv_format == "fp8" else (v, half)
    return attn_fwd(quant.decode(q_codes, q_format), quant.decode(k_codes, k_format), values, q_scale=q_scale,
                    k_scale=quant.expand_scale(k_scale, kv_len, block_k), v_scale=v_scale, bias=bias, p_format=p_format, **how)


def lse_correction(q: np.ndarray, k_mean: np.ndarray, scale: float) -> np.ndarray:
    """What K smoothing took from every row's LSE: scale * (q . k_mean), [B, Hq, Nq]; q is not smoothed."""
    b, heads, n, d = q.shape
    kv_heads = k_mean.shape[1]
    grouped = q.reshape(b, kv_heads, heads // kv_heads, n, d)
    return np.float32(scale) * np.einsum("bhgnd,bhd->bhgn", grouped, k_mean).reshape(b, heads, n)
