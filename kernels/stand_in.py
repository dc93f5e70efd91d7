"""What stands in for Triton where it is not installed: kernels keep their names and parameters, and nothing compiles.

A launcher then works as ever, and what it launches is served by a kernel that was shipped compiled, or refused.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


class NamedKernel:
    """A kernel's function, with what a launch asks of it."""

    def __init__(self, fn: Callable, do_not_specialize: Sequence[str] = ()) -> None:
        self.fn, self.do_not_specialize = fn, tuple(do_not_specialize)
        self.arg_names = list(inspect.signature(fn).parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        raise ImportError(f"{self.fn.__name__} is not among the kernels shipped compiled for this, and Triton, which would "
                          "compile it, is not installed; pip install triton")


class Constant:
    """A value that a kernel reads."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class NVMMASharedLayout:
    """How rows of a tile lie in shared memory, as TMA writes and wgmma reads them."""

    swizzle_byte_width: int
    element_bitwidth: int
    rank: int = 2


@dataclass
class TensorDescriptor:
    """A tensor that TMA reads: its base, shape and strides in elements, and the block and layout of one read."""

    base: Any
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: NVMMASharedLayout
    padding: str = "zero"


def jit(fn: Callable | None = None, do_not_specialize: Sequence[str] = ()) -> Any:
    """The decorator of kernels, with or without arguments."""
    return NamedKernel(fn, do_not_specialize) if fn else lambda fn: NamedKernel(fn, do_not_specialize)


triton = SimpleNamespace(jit=jit, next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
                         knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
tl = SimpleNamespace(constexpr=Constant)
gluon = SimpleNamespace(jit=jit, constexpr_function=lambda fn: fn)
gl = SimpleNamespace(constexpr=Constant, NVMMASharedLayout=NVMMASharedLayout)
