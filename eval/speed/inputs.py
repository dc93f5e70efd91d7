"""Benchmark inputs made on the device: standard normal, K with an outlier channel offset.

A Triton kernel draws them, so that Paddle and PyTorch get the same values and nothing travels from the host.
"""
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from lowbit_video.kernels.buffers import as_buffer

BLOCK = 1024
CHANNEL_SEED = 7919
"""Seed of the channel offsets; any other than the values' own."""


@triton.jit
def normal_kernel(out, count, seed, channel_seed, offset, tokens_dim, D, HEADS, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """out [B, H, N, D] = normal + offset, the offset times a normal number of its (head, channel) with CHANNELS."""
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # int32 counters wrap past 2**31 elements: fold the high part into the seed
    b_x = tl.randn(seed + (tl.program_id(0) >> 20), (o_x & 0x3FFFFFFF).to(tl.int32))
    if CHANNELS:
        o_channel = (o_x // tokens_dim) % HEADS * D + o_x % D
        b_x += offset * tl.randn(channel_seed, o_channel.to(tl.int32))
    else:
        b_x += offset
    tl.store(out + o_x, b_x, mask=o_x < count)


def fill_normal(out: Any, shape: tuple[int, int, int, int], seed: int, offset: float = 0.0, channels: bool = False) -> None:
    """Fills a contiguous [B, H, N, D] tensor; call inside the runtime's `launch_guard`."""
    batch, heads, tokens, head_dim = shape
    count = batch * heads * tokens * head_dim
    grid = (triton.cdiv(count, BLOCK),)
    normal_kernel[grid](as_buffer(out), count, seed, CHANNEL_SEED, float(offset), tokens * head_dim, head_dim, heads,
                        BLOCK=BLOCK, CHANNELS=channels)


def make_inputs(runtime: Any, shape: tuple[int, int, int, int], dtype: str, like: Any, *, kv_heads: int | None = None,
                seed: int = 1, v_offset: float = 0.0) -> tuple[Any, Any, Any]:
    """q, k, v as contiguous [B, H, N, D] tensors of the runtime: normal; K plus twice a normal offset per (head, channel)."""
    batch, heads, tokens, head_dim = shape
    kv_shape = (batch, kv_heads or heads, tokens, head_dim)
    q, k, v = (runtime.empty(s, dtype, like) for s in (shape, kv_shape, kv_shape))
    with runtime.launch_guard(q):
        fill_normal(q, shape, seed)
        fill_normal(k, kv_shape, seed + 1000, 2.0, channels=True)
        fill_normal(v, kv_shape, seed + 2000, v_offset)
    return q, k, v
