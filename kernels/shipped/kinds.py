"""What a compiler may know of a launch's arguments, in words, and whether code compiled for some will do for others.

Triton compiles a kernel anew for every kind of argument: a pointer's type and whether it is a multiple of 16, an integer's
width, whether it is 1 or divides by 16, each None. A build knows its arguments' kinds by these words:

    i32, i64, i32/16, i64/16    an integer, and one that divides by 16;  =1  one that is 1
    f32, none                   a float, and what is left out
    *float16, *float16/16       a pointer, and one to a multiple of 16 bytes
    tma int8[64, 64] ...        a descriptor: what it reads and the layout that it reads it to
"""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ALIGNMENT = 16
INT32 = range(-(2**31), 2**31)
INT64 = range(-(2**63), 2**63)


class Parameter(NamedTuple):
    """One parameter of a kernel; constant: it is compiled in. specialised: an integer's value may be, or its divisibility."""

    name: str
    constant: bool
    specialised: bool


class Described(NamedTuple):
    """A launch as a compiler sees it.

    name: the kernel's, with its module. constants: what is compiled in, options too, as "NAME=value". kinds: of the other
    arguments. values: those arguments.
    """

    name: str
    constants: tuple[str, ...]
    kinds: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def key(self) -> tuple:
        return self.name, self.constants, self.kinds


@functools.cache
def parameters(fn: Callable, general: tuple[str, ...] = ()) -> tuple[Parameter, ...]:
    """The parameters of a kernel's function; general: those that Triton was told not to specialise."""
    return tuple(Parameter(name, "constexpr" in str(one.annotation), name not in general)
                 for name, one in inspect.signature(fn).parameters.items())


def name_of(fn: Callable) -> str:
    """A kernel's name among all kernels, such as "quant.quant_v:quant_v_kernel"."""
    return f"{fn.__module__.partition('kernels.')[2]}:{fn.__name__}"


def describe(kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any]) -> Described:
    """What `launch(kernel, grid, *arguments, **constants)` is to a compiler."""
    expected = parameters(kernel.fn, tuple(kernel.do_not_specialize))
    given = dict(zip((one.name for one in expected), arguments), **constants)
    compiled_in, kinds, values = [], [], []
    for one in expected:
        value = given.pop(one.name)
        if one.constant:
            compiled_in.append(f"{one.name}={_in_words(value)}")
        else:
            kinds.append(kind_of(value, one.specialised))
            values.append(value)
    compiled_in += sorted(f"{name}={value}" for name, value in given.items())
    return Described(name_of(kernel.fn), tuple(compiled_in), tuple(kinds), tuple(values))


def _in_words(value: Any) -> str:
    """A constant; a layout by what tells it from others, for Triton's versions do not agree on the rest."""
    if hasattr(value, "swizzle_byte_width"):
        return f"swizzled({value.swizzle_byte_width}, {value.element_bitwidth}, {value.rank})"
    return repr(value)


def kind_of(value: Any, specialised: bool = True) -> str:
    """The kind of an argument that is not compiled in. Raises TypeError for what no kernel here takes."""
    if value is None:
        return "none"
    if hasattr(value, "block_shape"):
        layout = getattr(value, "layout", None)  # the portable kernels' descriptors leave it to the compiler
        return f"tma {value.base.dtype}{list(value.block_shape)}" + ("" if layout is None else f" {_in_words(layout)}")
    if hasattr(value, "data_ptr"):
        return f"*{value.dtype}" + ("" if value.data_ptr() % ALIGNMENT else "/16")
    if isinstance(value, float):
        return "f32"
    if isinstance(value, int) and not isinstance(value, bool) and value in INT64:
        if specialised and value == 1:
            return "=1"
        return ("i32" if value in INT32 else "i64") + ("/16" if specialised and value % ALIGNMENT == 0 else "")
    raise TypeError(f"a kernel's argument is an integer of 64 bits, a float, a buffer, a descriptor or None, not {value!r}")


_ALSO = {"i32": ("i32/16", "=1"), "i64": ("i32", "i32/16", "i64/16", "=1"), "i64/16": ("i32/16",)}
"""Kinds of integers that code compiled for one does for too."""


def does_for(built: str, given: str) -> bool:
    """Whether code compiled for the kind `built` is right for an argument of the kind `given`."""
    return built == given or given in _ALSO.get(built, ()) or (built.startswith("*") and given == f"{built}/16")
