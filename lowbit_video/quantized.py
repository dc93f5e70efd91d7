"""`quantize()`: a tensor's low-bit codes and scales, exactly as the attention kernels take them."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, QK_FORMATS, scale_block

from .arguments import flag, shown
from .engine.checks import refuse_gradients, require_finite, require_readable
from .engine.options import LAYOUTS
from .precision import GRANULARITIES
from .runtime import detect
from .runtime.protocol import Runtime

OPERANDS = ("q", "k", "v")


@dataclass(frozen=True)
class Quantized:
    """Codes and scales of one operand, contiguous, on the tensor's device.

    codes: q, k: [B, H, N, D / codes_per_byte] (int8, uint8 or float8); v: [B, H, D, N padded to 128] float8, transposed and
        permuted within 16 keys. scale: float32 [B, H, ceil(N / rows)] per block, [B, H, N] per token, [B, H, D] for v.
    mean: float32 [B, H, D] that was subtracted first, or None. length: N.
    """

    codes: Any
    scale: Any
    mean: Any
    format: str
    granularity: str
    operand: str
    length: int


def quantize(x: Any, format: str = "int8", granularity: str = "block", operand: str = "k", smooth: bool | None = None,
             tensor_layout: str = "NHD", check_finite: bool | None = None) -> Quantized:
    """Quantise one operand of attention.

    x: [B, N, H, D] ("NHD") or [B, H, N, D] ("HND") Paddle or torch tensor, float16, bfloat16 or float32; it is not changed.
    format: "int8", "int4", "int2" or "fp8"; v takes "fp8" only, one scale per channel.
    granularity: "block" (128 rows of k share a scale) or "token" (one per row). q has one per row either way.
    operand: "q", "k" or "v": which layout and scales. smooth: subtract the mean over the tokens;
        default: yes for k, no for q and v.
    Raises ValueError for what does not exist, listing what does; TypeError for another dtype; NonFiniteError for NaN and
        infinity; UnsupportedError where gradients are asked for: codes and scales carry none.
    """
    _one_of("format", format, QK_FORMATS)
    _one_of("granularity", granularity, GRANULARITIES)
    _one_of("operand", operand, OPERANDS)
    _one_of("tensor_layout", tensor_layout, LAYOUTS)
    smooth = None if smooth is None else flag("smooth", smooth)
    check_finite = None if check_finite is None else flag("check_finite", check_finite)
    if operand == "v" and (format != "fp8" or smooth):
        raise ValueError("v is quantised to fp8 with one scale per channel and no smoothing; given: "
                         f"format={format!r}, smooth={smooth}")
    smooth = operand == "k" if smooth is None else smooth
    runtime = detect.runtime_of(x)
    require_readable(runtime, x=x)
    shape = runtime.shape(x)
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"expected 4 dimensions ({tensor_layout}), none of them zero; given: {list(shape)}")
    refuse_gradients(runtime, x)
    length = shape[1 if tensor_layout == "NHD" else 2]
    if shape[3] % 4:
        raise ValueError(f"head_dim must be a multiple of 4 to be packed; given: {shape[3]}")
    if runtime.dtype_name(x) not in FORMAT_OF_DTYPE:
        raise TypeError(f"quantize() takes {', '.join(FORMAT_OF_DTYPE)}; given: {runtime.dtype_name(x)}")
    if runtime.is_cpu(x):
        if check_finite or check_finite is None:
            require_finite(runtime, x=x)
        codes, scale, mean = _quantize_reference(runtime.to_numpy(x), format, granularity, operand, smooth, tensor_layout)
        parts = dict(codes=runtime.from_numpy(codes, x, codes.dtype.name), scale=runtime.from_numpy(scale, x, "float32"),
                     mean=None if mean is None else runtime.from_numpy(mean, x, "float32"))
    else:
        from .engine.gpu import run_quantize

        if check_finite:
            require_finite(runtime, x=x)
        parts = run_quantize(x, format=format, granularity=granularity, operand=operand, smooth=smooth,
                             tensor_layout=tensor_layout, runtime=runtime)
    return Quantized(**parts, format=format, granularity=granularity, operand=operand, length=length)


def dequantize(quantized: Quantized) -> np.ndarray:
    """The values that the codes stand for, float32 NumPy [B, H, N, D], the mean added back, without gradients; TypeError for
    anything else."""
    from lowbit_video.kernels.quant import reference

    if not isinstance(quantized, Quantized):
        raise TypeError(f"dequantize() takes what quantize() returned; given: {shown(quantized)}")
    runtime = detect.runtime_of(quantized.scale)
    codes = quantized.codes
    if quantized.format == "fp8":
        import ml_dtypes

        codes = codes.view(dtype=_uint8(runtime))
        codes = runtime.to_numpy(codes).view(ml_dtypes.float8_e4m3fn)
    else:
        codes = runtime.to_numpy(codes)
    scale = runtime.to_numpy(quantized.scale)
    if quantized.operand == "v":
        return reference.decode_v(codes, quantized.length) * scale[:, :, None]
    block = scale_block(quantized.operand, quantized.granularity)
    values = reference.decode(codes, quantized.format) * reference.expand_scale(scale, quantized.length, block)[..., None]
    return values if quantized.mean is None else values + runtime.to_numpy(quantized.mean)[:, :, None]


def _quantize_reference(array: np.ndarray, format: str, granularity: str, operand: str, smooth: bool, tensor_layout: str):
    from lowbit_video.kernels.quant import reference

    array = np.asarray(array.transpose(0, 2, 1, 3) if tensor_layout == "NHD" else array, dtype=np.float32)
    if operand == "v":
        return *reference.quantize_v(array), None
    mean = reference.token_mean(array) if smooth else None
    block = scale_block(operand, granularity)
    return *reference.quantize_rows(array, format, block, mean), mean


def _uint8(runtime: Runtime) -> Any:
    import sys

    return sys.modules[runtime.NAME].uint8


def _one_of(name: str, given: str, known: tuple[str, ...]) -> None:
    if not isinstance(given, str) or given not in known:
        raise ValueError(f"unknown {name} {shown(given)}; there are: {', '.join(known)}")
