"""The 16-bit type in which P and a float32 V are multiplied, and V in it: float16 where its range holds V, else bfloat16.

A channel whose values are all under float16's normal numbers is first multiplied by a power of two, which is exact, and the
output divided by it, as FP8's scale per channel does. A GPU takes bfloat16, whose range is float32's, and needs neither.
"""
from __future__ import annotations

import ml_dtypes
import numpy as np

from lowbit_video.kernels.formats import get_format

FP16_MAX = get_format("fp16").max_code
FP16_MIN_NORMAL = 2.0**-14


def in_half(v: np.ndarray) -> tuple[np.ndarray, str, np.ndarray]:
    """(values, half, exponent): v [B, H, N, D] float32 is about values * 2**exponent, and values are in `half` to the bit.

    half: "fp16" or "bf16". exponent: int32 [B, H, 1, D], 0 but for channels that are tiny.
    """
    largest = np.abs(v).max(axis=2, keepdims=True, initial=0.0)
    exponent = np.where(largest < FP16_MIN_NORMAL, np.frexp(largest)[1], 0)
    if not largest.max(initial=0.0) <= FP16_MAX:  # NaN too
        return v.astype(ml_dtypes.bfloat16).astype(np.float32), "bf16", np.zeros_like(exponent)
    return np.ldexp(v, -exponent).astype(np.float16).astype(np.float32), "fp16", exponent


def restored(out: np.ndarray, exponent: np.ndarray | None) -> np.ndarray:
    """The output [B, Hq, N, D] for V itself, of that for V's values."""
    if exponent is None or not exponent.any():
        return out
    return np.ldexp(out, exponent.repeat(out.shape[1] // exponent.shape[1], axis=1))


def saturated(out: np.ndarray, dtype: str) -> np.ndarray:
    """The output as `dtype` holds it: a mean of V that rounding took past float16's largest number is that number, not inf."""
    return np.where(np.isfinite(out), np.clip(out, -FP16_MAX, FP16_MAX), out) if dtype == "float16" else out


def fits_float16(v: np.ndarray) -> bool:
    """Whether float16's range holds every value, and its normal numbers the largest of all that are not zero.

    v: float32, the channels last.
    """
    largest = np.abs(v).reshape(-1, v.shape[-1]).max(axis=0, initial=0.0)
    return bool((largest <= FP16_MAX).all() and (largest[largest > 0] >= FP16_MIN_NORMAL).all())
