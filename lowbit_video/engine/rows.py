"""Rows of attention's output as INT8 with a scale each, for the way back between GPUs."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.exchange.layout import ALIGNMENT
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE
from lowbit_video.kernels.operands import Operand
from lowbit_video.kernels.quant import reference as quant
from lowbit_video.kernels.quant.shapes import ceil_div

from ..runtime.protocol import Runtime
from .replay import again

FORMAT = "int8"


def _parts(tokens: int, batch: int, heads: int, head_dim: int) -> tuple[int, int]:
    """(bytes of the codes, bytes of all) of so many rows: codes [B, heads, tokens, D], then scales [B, heads, tokens]."""
    codes = ceil_div(tokens * batch * heads * head_dim, ALIGNMENT) * ALIGNMENT
    return codes, codes + ceil_div(tokens * batch * heads * 4, ALIGNMENT) * ALIGNMENT


def rows_size(tokens: int, batch: int, heads: int, head_dim: int) -> int:
    """Bytes of the codes and scales of so many rows."""
    return _parts(tokens, batch, heads, head_dim)[1]


def encode_rows(x: Any, shares: Sequence[int], own: int | None, runtime: Runtime) -> tuple[Any, list[int]]:
    """(uint8 [bytes], bytes of each share): x [N, B, H, D], contiguous, in shares of its tokens, each codes and scales.

    own: the number of a share that stays here, of no bytes. A share of no tokens has none either.
    """
    _, batch, heads, head_dim = runtime.shape(x)
    stays = [number == own or not count for number, count in enumerate(shares)]
    sizes = [0 if stay else rows_size(count, batch, heads, head_dim) for stay, count in zip(stays, shares)]
    pieces = [(sum(shares[:number]), sum(sizes[:number]), count) for number, count in enumerate(shares) if not stays[number]]
    if runtime.is_cpu(x):
        memory, array = np.zeros(sum(sizes), np.uint8), runtime.to_numpy(x)
        for first, begin, count in pieces:
            rows = np.ascontiguousarray(array[first:first + count].transpose(1, 2, 0, 3), dtype=np.float32)
            codes, scale = quant.quantize_rows(rows, FORMAT, None)
            after = begin + _parts(count, batch, heads, head_dim)[0]
            memory[begin:begin + codes.size] = codes.reshape(-1).view(np.uint8)
            memory[after:after + scale.nbytes] = scale.reshape(-1).view(np.uint8)
        return runtime.from_numpy(memory, x, "uint8"), sizes
    memory, dtype = runtime.empty((sum(sizes),), "uint8", x), runtime.dtype_name(x)
    size, row = 4 if dtype == "float32" else 2, batch * heads * head_dim

    def launch(x: Buffer, memory: Buffer) -> None:
        from lowbit_video.kernels.quant.quant_qk import launch_quant_qk

        for first, begin, count in pieces:
            rows = Operand(x.at(first * row * size, dtype), (batch, heads, count, head_dim), (heads * head_dim, head_dim, row),
                           FORMAT_OF_DTYPE[dtype])
            launch_quant_qk(rows, _stored(memory, begin, count, batch, heads, head_dim))

    again(("encode rows", tuple(shares), own, batch, heads, head_dim, dtype), runtime, (x, memory), launch)
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
    size, row = 4 if dtype == "float32" else 2, all_heads * head_dim

    def launch(memory: Buffer, out: Buffer) -> None:
        from lowbit_video.kernels.exchange.dequant_rows import launch_dequant_rows

        target = Operand(out.at(first_head * head_dim * size, dtype), (batch, heads, tokens, head_dim),
                         (tokens * row, head_dim, row), FORMAT_OF_DTYPE[dtype])
        launch_dequant_rows(_stored(memory, begin, tokens, batch, heads, head_dim), target)

    again(("decode rows", begin, first_head, heads, batch, tokens, all_heads, head_dim, dtype), runtime, (memory, out), launch)


def _stored(memory: Buffer, begin: int, tokens: int, batch: int, heads: int, head_dim: int) -> Operand:
    per_head = tokens * head_dim
    scale = memory.at(begin + _parts(tokens, batch, heads, head_dim)[0], "float32")
    return Operand(memory.at(begin, "int8"), (batch, heads, tokens, head_dim), (heads * per_head, per_head, head_dim), FORMAT,
                   scale, None, (heads * tokens, tokens))
