"""NumPy: a norm over a head's channels and rotary positions, rounded where the framework's own steps round.

What the fused kernels must reproduce before they quantise; `quant.reference` has the rest.
"""
from __future__ import annotations

import ml_dtypes
import numpy as np

from .steps import Norm, Rotary

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as `dtype` holds it, in float32."""
    return x.astype(DTYPES[dtype]).astype(np.float32)


def normed(x: np.ndarray, norm: Norm, dtype: str) -> np.ndarray:
    """x [.., D] float32, of values of `dtype`, normed over the last dimension; the norm's weight and bias are arrays."""
    if norm.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True, dtype=np.float32)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True, dtype=np.float32) + np.float32(norm.eps))
    if norm.rounds_first:
        x = rounded(x, dtype)
    if norm.weight is not None:
        x = x * np.asarray(norm.weight, np.float32)
    if norm.bias is not None:
        x = x + np.asarray(norm.bias, np.float32)
    return rounded(x, dtype)


def turned(x: np.ndarray, rotary: Rotary, dtype: str) -> np.ndarray:
    """x [B, H, N, D] float32 with its rotary tokens turned; cos and sin are arrays [tokens, D]."""
    cos, sin = (np.asarray(table, np.float32)[:, ::2] for table in (rotary.cos, rotary.sin))
    x, rows = x.copy(), slice(rotary.begin, rotary.begin + rotary.tokens)
    even, odd = x[:, :, rows, ::2].copy(), x[:, :, rows, 1::2].copy()
    x[:, :, rows, ::2] = rounded(even * cos - odd * sin, dtype)
    x[:, :, rows, 1::2] = rounded(odd * cos + even * sin, dtype)
    return x


def prepared(x: np.ndarray, norm: Norm | None, rotary: Rotary | None, dtype: str, rest: np.ndarray | None = None) -> np.ndarray:
    """Q or K [B, H, N, D] float32 as attention takes it, from what its projection left; rest: the tokens behind x's."""
    x = np.asarray(x, np.float32)
    if rest is not None:
        x = np.concatenate([x, np.asarray(rest, np.float32)], 2)
    if norm is not None:
        x = normed(x, norm, dtype)
    return x if rotary is None else turned(x, rotary, dtype)
