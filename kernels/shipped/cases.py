"""Every launch that the shipped kernels serve: what the Hopper variants' calls make, each by its own launcher, on no memory.

Two kinds of tensors stand for all: one as frameworks make them (multiples of 16 everywhere), and for the small kernels one
with nothing to rely on, whose code is slower and right for every other.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from ..attention.hopper.launch import launch_attn_fwd
from ..buffers import Buffer
from ..exchange.combine_stats import launch_combine_stats
from ..exchange.copy_parts import COLUMNS, launch_copy_parts, table_of
from ..exchange.dequant_rows import launch_dequant_rows
from ..exchange.layout import Copy
from ..exchange.merge import launch_merge
from ..formats import BLOCK_K, FORMAT_OF_DTYPE
from ..launch import placed
from ..operands import Operand, codes_of, v_codes_of
from ..quant.quant_qk import launch_quant_qk
from ..quant.quant_v import launch_quant_v
from ..quant.token_stats import launch_stats
from .choice import GROUPS
from .kinds import Described, describe

HEAD_DIMS = (64, 128)
DTYPES = ("float16", "bfloat16")
FORMATS = (("int8", "fp8"), ("int8", "fp16"), ("fp8", "fp8"))
"""Of Q and K, and of P.V."""
ODD = 2**31 + 1
"""A stride that is not one of 32 bits, nor a multiple of anything."""


class Sample(NamedTuple):
    """A launch of a kernel, with what it is to a compiler."""

    described: Described
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class _Collector:
    """Takes launches in place of a device."""

    def __init__(self) -> None:
        self.taken: dict[tuple, Sample] = {}

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> bool:
        described = describe(kernel, arguments, constants)
        self.taken.setdefault(described.key, Sample(described, kernel, grid, arguments, constants))
        return True


@functools.cache
def samples() -> list[Sample]:
    """One launch for each kernel that is shipped, no two alike to a compiler; attention first."""
    collector = _Collector()
    with placed(collector):
        for launch in _launches():
            launch()
    return list(collector.taken.values())


def _launches() -> Iterator[Callable[[], None]]:
    for (qk, pv), head_dim, dtype, causal, lse in product(FORMATS, HEAD_DIMS, DTYPES, (False, True), ("", "lse", "shifted")):
        yield lambda a=(qk, pv, head_dim, dtype, causal, lse): _attend(*a)
    for head_dim, dtype, causal, lse in product(HEAD_DIMS, DTYPES, (False, True), ("", "lse")):
        yield lambda a=(head_dim, dtype, causal, lse): _attend_exactly(*a)
    for head_dim, dtype, even in product(HEAD_DIMS, DTYPES, (True, False)):
        yield lambda a=(head_dim, dtype, even): _statistics(*a)
        yield lambda a=(head_dim, dtype, even): _quantise(*a)
        yield lambda a=(head_dim, dtype, even): _dequantise(*a)
    for head_dim, dtype in product(HEAD_DIMS, DTYPES):
        yield lambda a=(head_dim, dtype): _merge(*a)
    yield _combine
    yield _copy


def buffer(dtype: str, even: bool = True, number: int = 0) -> Buffer:
    """Memory that nothing touches; number: another one."""
    return Buffer((number + 1 << 30) + (0 if even else 4), dtype)


def operand(head_dim: int, dtype: str, even: bool = True, heads: int = 6, number: int = 0) -> Operand:
    """A tensor of [2, N, H, D] memory, or one of odd strides."""
    tokens = 1000
    strides = (tokens * heads * head_dim, head_dim, heads * head_dim) if even else (3 * ODD, ODD, 5 * ODD)
    return Operand(buffer(dtype, even, number), (2, heads, tokens, head_dim), strides, FORMAT_OF_DTYPE[dtype])


def _codes(x: Operand, format: str, block: int | None, even: bool = True) -> Operand:
    made = codes_of(x, format, buffer("uint8", even, 10), buffer("float32", even, 11), block)
    return made if even else made._replace(strides=(ODD, 3 * ODD, 5 * ODD))


def _attend(qk: str, pv: str, head_dim: int, dtype: str, causal: bool, lse: str) -> None:
    q, kv = operand(head_dim, dtype), operand(head_dim, dtype, heads=3, number=1)
    v = v_codes_of(kv, buffer("uint8", number=2), buffer("float32", number=3)) if pv == "fp8" else kv
    launch_attn_fwd(_codes(q, qk, None), _codes(kv, qk, BLOCK_K), v, operand(head_dim, dtype, number=4), sm_scale=0.125,
                    is_causal=causal, lse=buffer("float32", number=5) if lse else None,
                    lse_shift=buffer("float32", number=6) if lse == "shifted" else None)


def _attend_exactly(head_dim: int, dtype: str, causal: bool, lse: str) -> None:
    q, k, v = (operand(head_dim, dtype, heads=heads, number=number) for number, heads in ((0, 6), (1, 3), (2, 3)))
    launch_attn_fwd(q, k, v, operand(head_dim, dtype, number=4), sm_scale=0.125, is_causal=causal,
                    lse=buffer("float32", number=5) if lse else None)


def _statistics(head_dim: int, dtype: str, even: bool) -> None:
    x, found = operand(head_dim, dtype, even), {"k_mean": buffer("float32", even, 2), "v_scale": buffer("float32", even, 3)}
    for names in (("k_mean",), ("v_scale",), ("k_mean", "v_scale")):
        launch_stats(buffer("float32", even, 4), **{name: found[name] for name in names}, **{name[0]: x for name in names})


def _quantise(head_dim: int, dtype: str, even: bool) -> None:
    x, float32 = operand(head_dim, dtype, even), lambda number: buffer("float32", even, number)
    for format in ("int8", "fp8"):
        for mean in (None, float32(1)):
            launch_quant_qk(x, _codes(x, format, BLOCK_K, even), mean=mean)
        launch_quant_qk(x, _codes(x, format, None, even), sm_scale=0.125)
        for group in GROUPS if even else (1,):
            launch_quant_qk(x, _codes(x, format, None, even), lse_shift=float32(2), k_mean=float32(3), sm_scale=0.125,
                            group=group)
    codes = v_codes_of(x, buffer("uint8", even, 4), float32(5))
    launch_quant_v(x, codes if even else codes._replace(strides=(ODD, 3 * ODD, 5 * ODD)))


def _dequantise(head_dim: int, dtype: str, even: bool) -> None:
    codes = _codes(operand(head_dim, dtype, even), "int8", None, even)
    strides = (6006, 1001) if even else (ODD, 3 * ODD)  # of the scales, by tokens, which are any number
    launch_dequant_rows(codes._replace(scale_strides=strides), operand(head_dim, dtype, even, number=1))


def _merge(head_dim: int, dtype: str) -> None:
    for out, result, tokens_first in product((dtype, "float32"), (dtype, "float32"), (True, False)):
        launch_merge(buffer(out), buffer("float32", number=1), buffer(dtype, number=2), buffer("float32", number=3),
                     buffer(result, number=4), shape=(2, 6, 1000, head_dim), tokens_first=tokens_first)


def _combine() -> None:
    for means, statistics in ((1, 1), (0, 1), (1, 2)):
        launch_combine_stats(buffer("float32"), buffer("float32", number=1), buffer("float32", number=2), n=768, shares=2,
                             means=means, statistics=statistics)


def _copy() -> None:
    for columns, words in product(COLUMNS, (4, 1)):  # by 16 bytes, and by 4
        width = 4 * (3 * columns - (0 if words == 4 else 1))
        rows = table_of([Copy(0, 0, 0, 4 * width, 0, 0, 0, 4 * width, 3 * 4096 // columns - 1, width)])
        launch_copy_parts(*[buffer("int32", number=number) for number in range(3)], buffer("int64", number=3), rows, batch=2,
                          heads=6)
