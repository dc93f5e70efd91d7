"""Rows of attention's output as INT8 with a scale each, for the way back between GPUs."""
from __future__ import annotations

from typing import Any

import numpy as np

from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.exchange.layout import ALIGNMENT
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
from lowbit_video.kernels.operands import Operand
from lowbit_video.kernels.quant import reference as quant
from lowbit_video.kernels.quant.shapes import ceil_div

from ..runtime.protocol import Runtime

FORMAT = "int8"


def _parts(tokens: int, batch: int, heads: int, head_dim: int) -> tuple[int, int]:
    """(bytes of the codes, bytes of all) of so many rows: codes [B, heads, tokens, D], then scales [B, heads, tokens]."""
    codes = ceil_div(tokens * batch * heads * head_dim, ALIGNMENT) * ALIGNMENT
    return codes, codes + ceil_div(tokens * batch * heads * 4, ALIGNMENT) * ALIGNMENT


def rows_size(tokens: int, batch: int, heads: int, head_dim: int) -> int:
    """Bytes of the codes and scales of so many rows."""
    return _parts(tokens, batch, heads, head_dim)[1]


def encode_rows(x: Any, shares: list[int], runtime: Runtime) -> tuple[Any, list[int]]:
    """(uint8 [bytes], bytes of each share): x [N, B, H, D], contiguous, in shares of its tokens, each codes and scales."""
    _, batch, heads, head_dim = runtime.shape(x)
    sizes = [rows_size(count, batch, heads, head_dim) for count in shares]
    firsts, begins = ([sum(row[:place]) for place in range(len(row))] for row in (shares, sizes))
    if runtime.is_cpu(x):
        memory, array = np.zeros(sum(sizes), np.uint8), runtime.to_numpy(x)
        for first, begin, count in zip(firsts, begins, shares):
            rows = np.ascontiguousarray(array[first:first + count].transpose(1, 2, 0, 3), dtype=np.float32)
            codes, scale = quant.quantize_rows(rows, FORMAT, None)
            after = begin + _parts(count, batch, heads, head_dim)[0]
            memory[begin:begin + codes.size] = codes.reshape(-1).view(np.uint8)
            memory[after:after + scale.nbytes] = scale.reshape(-1).view(np.uint8)
        return runtime.from_numpy(memory, x, "uint8"), sizes
    from lowbit_video.kernels.quant.quant_qk import launch_quant_qk

    memory, dtype = runtime.empty((sum(sizes),), "uint8", x), runtime.dtype_name(x)
    size, row = 4 if dtype == "float32" else 2, batch * heads * head_dim
    with runtime.launch_guard(x):
        for first, begin, count in zip(firsts, begins, shares):
            rows = Operand(Buffer(x.data_ptr() + first * row * size, dtype), (batch, heads, count, head_dim),
                           (heads * head_dim, head_dim, row), FORMAT_OF_DTYPE[dtype])
            launch_quant_qk(rows, _stored(memory, begin, count, batch, heads, head_dim))
    return memory, sizes


def decode_rows(memory: Any, begin: int, out: Any, first_head: int, heads: int, runtime: Runtime) -> None:
    """Writes rows that begin at a byte of memory into heads of out [B, N, H, D], contiguous."""
    batch, tokens, all_heads, head_dim = runtime.shape(out)
    codes_bytes, _ = _parts(tokens, batch, heads, head_dim)
    dtype = runtime.dtype_name(out)
    if runtime.is_cpu(out):
        array = runtime.to_numpy(memory)
        count = batch * heads * tokens
        codes = array[begin:begin + count * head_dim].view(np.int8).reshape(batch, heads, tokens, head_dim)
        scale = np.ascontiguousarray(array[begin + codes_bytes:begin + codes_bytes + count * 4]).view(np.float32)
        values = codes.astype(np.float32) * scale.reshape(batch, heads, tokens, 1)
        out[:, :, first_head:first_head + heads] = runtime.from_numpy(values.transpose(0, 2, 1, 3), out, dtype)
        return
    from lowbit_video.kernels.exchange.dequant_rows import launch_dequant_rows

    size, row = 4 if dtype == "float32" else 2, all_heads * head_dim
    target = Operand(Buffer(out.data_ptr() + first_head * head_dim * size, dtype), (batch, heads, tokens, head_dim),
                     (tokens * row, head_dim, row), FORMAT_OF_DTYPE[dtype])
    with runtime.launch_guard(out):
        launch_dequant_rows(_stored(memory, begin, tokens, batch, heads, head_dim), target)


def _stored(memory: Any, begin: int, tokens: int, batch: int, heads: int, head_dim: int) -> Operand:
    place, per_head = memory.data_ptr() + begin, tokens * head_dim
    scale = Buffer(place + _parts(tokens, batch, heads, head_dim)[0], "float32")
    return Operand(Buffer(place, "int8"), (batch, heads, tokens, head_dim), (heads * per_head, per_head, head_dim), FORMAT,
                   scale, None, (heads * tokens, tokens))
