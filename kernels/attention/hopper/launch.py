"""The launch of the Hopper kernel: what its arguments are, in memory and by name."""
from __future__ import annotations

from typing import Any

import triton

from ...buffers import Buffer, as_buffer
from ...formats import BLOCK_K, LOG2_E
from ...launch import launch
from ..gluon_shim import TensorDescriptor, gl
from .build import CONFIGS, Build, HopperConfig
from .kernel import attn_fwd_kernel
from .registers import ROWS


def _swizzled(inner: int, bits: int, rank: int = 2) -> gl.NVMMASharedLayout:
    """Layout of a shared tile whose rows hold `inner` elements, as TMA writes and wgmma reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, inner * bits // 8), element_bitwidth=bits, rank=rank)


def _codes_descriptor(codes: Buffer, rows: int, columns: int, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(codes, [rows, columns], [columns, 1], list(block), _swizzled(block[1], 8))


def _v_descriptor(v: Buffer, shape: tuple[int, int, int, int], strides: tuple[int, int, int], block_n: int) -> TensorDescriptor:
    """The caller's own 16-bit V, by its strides; TMA fills rows past the end with zeros."""
    if v.data_ptr() % 16 or any(stride % 8 for stride, length in zip(strides, shape) if length > 1):
        raise ValueError(f"16-bit V at {v.data_ptr():#x} with strides {strides} (batch, head, token): the Hopper kernel "
                         "takes multiples of 16 bytes; pass a contiguous V or backend='triton'")
    # the stride of a dimension of one element is never used, and may be anything
    strides = [stride if length > 1 else shape[3] for stride, length in zip(strides, shape)]
    return TensorDescriptor(v, list(shape), [*strides, 1], [1, 1, block_n, shape[3]], _swizzled(shape[3], 16, rank=4))


def launch_arguments(q: Any, k: Any, v: Any, out: Any, *, q_shape: tuple[int, int, int, int],
                     kv_shape: tuple[int, int, int, int], q_format: str, pv_format: str,
                     out_strides: tuple[int, int, int], q_scale: Any, k_scale: Any,
                     sm_scale: float, v_strides: tuple[int, int, int] | None = None, v_scale: Any = None, lse: Any = None,
                     lse_shift: Any = None, is_causal: bool = False, config: HopperConfig | None = None
                     ) -> tuple[int, tuple, dict]:
    """Work items, positional arguments and constants of a launch; see `launch_attn_fwd`."""
    batch, q_heads, q_len, head_dim = q_shape
    _, kv_heads, kv_len, _ = kv_shape
    fp8_pv = pv_format == "fp8"
    config = config or CONFIGS[head_dim, fp8_pv]
    block_n = config.block_n
    storage = "float8_e4m3fn" if q_format == "fp8" else "int8"
    q_desc = _codes_descriptor(as_buffer(q, storage), batch * q_heads * q_len, head_dim, (ROWS.value, head_dim))
    k_desc = _codes_descriptor(as_buffer(k, storage), batch * kv_heads * kv_len, head_dim, (block_n, head_dim))
    if fp8_pv:
        padded = triton.cdiv(kv_len, BLOCK_K) * BLOCK_K
        v_desc = _codes_descriptor(as_buffer(v, "float8_e4m3fn"), batch * kv_heads * head_dim, padded, (head_dim, block_n))
        v_layout, ones_layout = _swizzled(block_n, 8), _swizzled(block_n, 8)
    else:
        v_desc = _v_descriptor(as_buffer(v), kv_shape, v_strides, block_n)
        v_layout, ones_layout = _swizzled(head_dim, 16), _swizzled(block_n, 16)
    n_work = triton.cdiv(q_len, ROWS.value * config.consumers) * batch * q_heads
    scales = as_buffer(q_scale)
    arguments = (q_desc, k_desc, v_desc, as_buffer(out), as_buffer(lse) or scales, as_buffer(lse_shift) or scales, scales,
                 as_buffer(k_scale), as_buffer(v_scale) or scales, float(sm_scale * LOG2_E), q_heads, kv_heads, q_len, kv_len,
                 n_work, *out_strides)
    build = Build(**vars(config), head_dim=head_dim, causal=bool(is_causal), lse=lse is not None,
                  lse_shift=lse is not None and lse_shift is not None)
    constants = dict(build=build, V_LAYOUT=v_layout, ONES_LAYOUT=ones_layout, num_warps=4)
    return n_work, arguments, constants


def launch_attn_fwd(q: Any, k: Any, v: Any, out: Any, *, q_shape: tuple[int, int, int, int],
                    kv_shape: tuple[int, int, int, int], q_format: str, k_format: str, pv_format: str,
                    granularity: str = "block", out_strides: tuple[int, int, int],
                    v_strides: tuple[int, int, int] | None = None, q_scale: Any = None, k_scale: Any = None,
                    v_scale: Any = None, bias: Any = None, lse: Any = None, lse_shift: Any = None, sm_scale: float,
                    is_causal: bool = False, pv_dtype: str | None = None, arch: tuple[int, int] = (9, 0),
                    config: HopperConfig | None = None) -> None:
    """out = softmax(q k^T sm_scale) v on sm_90, from codes and scales as the quantisers left them.

    The arguments are those of the portable `launch_attn_fwd`. q_shape (B, Hq, Nq, D) and kv_shape (B, Hkv, Nkv, D), D 64 or
    128; strides are (batch, head, seq) in elements. q, k: contiguous HND codes, both "int8" or both "fp8"; q_scale
    [B, Hq, Nq], k_scale [B, Hkv, ceil(Nkv / 128)]. v: for pv_format "fp16" the caller's float16 or bfloat16 view by
    v_strides, for "fp8" the codes of `launch_quant_v` with v_scale [B, Hkv, D]. out: any float dtype, by out_strides. lse
    [B, Hq, Nq] float32, natural log, plus lse_shift if that is given. is_causal: key j is visible to query i if
    j <= i + Nkv - Nq; a row without a key gives 0 and -inf.
    sm_scale: not negative (the row maximum is taken before it is multiplied).
    Raises ValueError for what the kernel does not cover.
    """
    supported = {"q/k formats": ((q_format, k_format), (("int8", "int8"), ("fp8", "fp8"))),
                 "P.V format": (pv_format, ("fp16", "fp8")), "granularity": (granularity, ("block",)),
                 "head dim": (q_shape[3], (64, 128)), "arch": (tuple(arch), ((9, 0),))}
    for name, (given, known) in supported.items():
        if given not in known:
            raise ValueError(f"{name} {given} is not supported by the Hopper kernel (it has {known}); use backend='triton'")
    if bias is not None:
        raise ValueError("a score bias (smooth_q) is not supported by the Hopper kernel; use backend='triton'")
    if sm_scale < 0:
        raise ValueError(f"sm_scale {sm_scale} is negative; negate q and the scale")
    n_work, arguments, constants = launch_arguments(
        q, k, v, out, q_shape=q_shape, kv_shape=kv_shape, q_format=q_format, pv_format=pv_format, out_strides=out_strides,
        q_scale=q_scale, k_scale=k_scale, sm_scale=sm_scale, v_strides=v_strides, v_scale=v_scale, lse=lse, lse_shift=lse_shift,
        is_causal=is_causal, config=config)
    launch(attn_fwd_kernel, (n_work,), *arguments, **constants)
