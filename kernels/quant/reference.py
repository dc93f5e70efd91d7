"""NumPy quantisers: what the GPU quantisers must reproduce, and the CPU backend's own.

All arrays are float32, contiguous HND [B, H, N, D]; codes and scales come out exactly as the GPU
kernels store them.
Source: SageAttention (arXiv 2410.02367) section 4 for smoothing and per-block scales; here int4 and
int2 are mid-rise and Q's mean is taken per head. SmoothQuant (2211.10438), equation 4, for scales that even
out the channels of two operands, and QuaRot (2404.00456) for a Hadamard rotation of Q and K; here one follows
the other, and both fall into the quantisers.
"""
from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from ..formats import BLOCK_K, INT2_STEP, MIN_MAGNITUDE, PERMUTATION_16, get_format


def token_mean(x: np.ndarray) -> np.ndarray:
    """Mean over the tokens, [B, H, N, D] -> [B, H, D], accumulated in float64."""
    return x.mean(axis=2, dtype=np.float64).astype(np.float32)


def _groups(x: np.ndarray, rows: int) -> np.ndarray:
    """[B, H, N, D] -> [B, H, ceil(N / rows), rows, D], the tail zero-filled."""
    b, h, n, d = x.shape
    blocks = -(-n // rows)
    if blocks * rows != n:
        x = np.concatenate([x, np.zeros((b, h, blocks * rows - n, d), x.dtype)], axis=2)
    return x.reshape(b, h, blocks, rows, d)


def row_scale(x: np.ndarray, format_name: str, block: int | None) -> np.ndarray:
    """Scales of x [B, H, N, D]: [B, H, ceil(N / block)], or [B, H, N] where block is None (per token).

    absmax / max_code; for int2 rms * INT2_STEP, the rms taken over the rows that exist.
    """
    fmt = get_format(format_name)
    rows = block or 1
    grouped = _groups(x, rows)
    if format_name == "int2":
        n, d = x.shape[2:]
        count = np.minimum(rows, n - rows * np.arange(grouped.shape[2])) * d
        rms = np.sqrt((grouped.astype(np.float32) ** 2).sum(axis=(3, 4)) / count.astype(np.float32))
        return (np.maximum(rms, MIN_MAGNITUDE) * INT2_STEP).astype(np.float32)
    absmax = np.abs(grouped).max(axis=(3, 4))
    return (np.maximum(absmax, np.float32(MIN_MAGNITUDE)) / np.float32(fmt.max_code)).astype(np.float32)


def expand_scale(scale: np.ndarray, length: int, block: int | None) -> np.ndarray:
    """Scales per row, [B, H, length], from scales per block (or per token: returned as they are)."""
    return scale if block is None else np.repeat(scale, block, axis=2)[:, :, :length]


def encode(x: np.ndarray, scale: np.ndarray, format_name: str) -> np.ndarray:
    """Codes of x [B, H, N, D] with one scale per row [B, H, N]: [B, H, N, D / codes_per_byte], packed."""
    ratio = x / scale[..., None]
    if format_name == "int8":
        return np.clip(np.rint(ratio), -127, 127).astype(np.int8)
    if format_name == "fp8":
        return np.clip(ratio, -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn)
    fmt = get_format(format_name)
    half = 1 << (fmt.bits - 1)
    codes = np.clip(np.floor(ratio * np.float32(0.5)), -half, half - 1).astype(np.int8)
    return pack(codes, fmt.bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two's complement codes of 2 or 4 bits, [..., D] int8 -> [..., D * bits / 8] uint8, first in the lowest bits."""
    per_byte = 8 // bits
    fields = (codes.view(np.uint8) & ((1 << bits) - 1)).reshape(*codes.shape[:-1], -1, per_byte)
    packed = fields[..., 0].copy()
    for i in range(1, per_byte):
        packed |= fields[..., i] << (bits * i)
    return packed


def decode(codes: np.ndarray, format_name: str) -> np.ndarray:
    """Float32 values of stored codes, without their scale: [..., D]. int4 and int2 give odd integers."""
    fmt = get_format(format_name)
    if fmt.codes_per_byte == 1:
        return codes.astype(np.float32)
    shifts = np.arange(fmt.codes_per_byte, dtype=np.uint8) * fmt.bits
    fields = (codes[..., None] >> shifts) & ((1 << fmt.bits) - 1)
    half = 1 << (fmt.bits - 1)
    signed = (fields.astype(np.int16) ^ half) - half
    return (2 * signed + 1).astype(np.float32).reshape(*codes.shape[:-1], -1)


def quantize_rows(x: np.ndarray, format_name: str, block: int | None, mean: np.ndarray | None = None,
                  factors: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of x [B, H, N, D] after `mean` [B, H, D] was subtracted; block None means per token.

    factors: [B, H, D] of `rotation`, of Q or of K, by which x is rotated then; None leaves it as it is.
    """
    if mean is not None:
        x = x - mean[:, :, None]
    if factors is not None:
        x = rotate(x, factors)
    scale = row_scale(x, format_name, block)
    return encode(x, expand_scale(scale, x.shape[2], block), format_name), scale


def channel_top(x: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """The largest magnitude over the tokens after `mean` [B, H, D] was subtracted, [B, H, N, D] -> [B, H, D]."""
    return np.abs(x if mean is None else x - mean[:, :, None]).max(axis=2)


def rotation(q_top: np.ndarray, k_top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q's factors [B, Hq, D], K's [B, Hkv, D]) that make each channel as large in Q as in K; their products are 1.

    q_top, k_top: of `channel_top`. Heads of Q that share keys share their factors, by the largest of them.
    """
    heads, (batch, kv_heads, dim) = q_top.shape[1], k_top.shape
    q_top = np.maximum(q_top.reshape(batch, kv_heads, -1, dim).max(axis=2), MIN_MAGNITUDE)
    k_top = np.maximum(k_top, MIN_MAGNITUDE)
    return np.repeat(np.sqrt(k_top / q_top), heads // kv_heads, axis=1), np.sqrt(q_top / k_top)


@functools.cache
def hadamard(dim: int) -> np.ndarray:
    """The orthonormal Hadamard matrix [dim, dim] in float64, symmetric, its own inverse. dim: a power of two."""
    places = np.arange(dim)
    odd = np.array([bin(both).count("1") % 2 for both in (places[:, None] & places).ravel()]).reshape(dim, dim)
    return (1 - 2 * odd) / np.sqrt(dim)


def rotate(x: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """x [B, H, N, D] times its channels' factors [B, H, D], then through the Hadamard matrix: an outlier is spread over all.

    Q and K rotated with the factors of one `rotation` have the scores that they had.
    """
    return (x * factors[:, :, None]) @ hadamard(x.shape[-1]).astype(x.dtype)


def score_bias(q_mean: np.ndarray, k: np.ndarray, k_mean: np.ndarray | None) -> np.ndarray:
    """What Q smoothing took from the scores: q_mean . (k - k_mean), [B, Hq, Nkv], unscaled; k is not quantised."""
    group = q_mean.shape[1] // k.shape[1]
    if k_mean is not None:
        k = k - k_mean[:, :, None]
    b, heads, n, d = k.shape
    return np.einsum("bhgd,bhnd->bhgn", q_mean.reshape(b, heads, group, d), k).reshape(b, heads * group, n)


def v_scale(v: np.ndarray) -> np.ndarray:
    """V's scales per channel, [B, H, N, D] -> [B, H, D]: absmax / 448."""
    return (np.maximum(np.abs(v).max(axis=2), np.float32(MIN_MAGNITUDE)) / np.float32(448.0)).astype(np.float32)


def quantize_v(v: np.ndarray, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """V [B, H, N, D] in FP8, one scale per channel [B, H, D], its own or one that is given.

    Codes are transposed and permuted, [B, H, D, N padded to 128], the tail zero: within every 16 keys
    position 4t + 2h + e holds key 8h + 2t + e (see PERMUTATION_16).
    """
    scale = v_scale(v) if scale is None else scale
    codes = np.clip(v / scale[:, :, None], -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn)
    b, h, n, d = v.shape
    padded = -(-n // BLOCK_K) * BLOCK_K
    stored = np.zeros((b, h, padded, d), ml_dtypes.float8_e4m3fn)
    stored[:, :, :n] = codes
    stored = stored.reshape(b, h, padded // 16, 16, d)[:, :, :, list(PERMUTATION_16)].reshape(b, h, padded, d)
    return np.ascontiguousarray(stored.transpose(0, 1, 3, 2)), scale


def decode_v(codes: np.ndarray, length: int) -> np.ndarray:
    """The inverse of quantize_v's storing: float32 codes [B, H, length, D], without their scale."""
    b, h, d, padded = codes.shape
    rows = codes.transpose(0, 1, 3, 2).reshape(b, h, padded // 16, 16, d)
    inverse = np.argsort(PERMUTATION_16)
    return rows[:, :, :, inverse].reshape(b, h, padded, d)[:, :, :length].astype(np.float32)
