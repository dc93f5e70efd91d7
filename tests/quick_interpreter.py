"""Triton's CPU interpreter without what it does beside interpreting; imported by files whose kernels run in it.

No result depends on what is left out, and it takes less than half of the time: integers are added and multiplied a second
time, in 64 bits, for an assertion that is off; `tl` is prepared again for every launch and for every call of a device
function; types, shapes and constants are made anew for every value, and types that are the same are compared name by name; a
constant is written to every place of the block that it meets, where NumPy spreads one. NumPy's own loop sums products of
integers: float32 gives the same sums in a twentieth of the time, as long as none reaches 2^24.
"""
from __future__ import annotations

import dataclasses
import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language.core as core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

gc.set_threshold(100_000, 50, 50)  # millions of small values, none of which refers to itself

builder = interpreter.interpreter_builder
assert not builder.options.debug, "device_assert would look at what is computed for it"
builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

EXACT = 2 ** 24
"""Up to here float32 holds every integer."""
_BLOCKS: dict[tuple[Any, ...], Any] = {}
_CONSTANTS: dict[tuple[Any, ...], tuple[Any, Any]] = {}
_NUMPY: dict[str, Any] = {}
_SCALAR = core.tuple([]), core.constexpr(1)
_REAL_BLOCK, _REAL_EQUAL, _REAL_NUMPY = core.block_type.__init__, core.dtype.__eq__, interpreter._get_np_dtype
_REAL_OPERANDS, _REAL_BROADCAST = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
_REAL_EXPAND, _REAL_VALUE, _REAL_DOT = (TritonSemantic.expand_dims, TritonSemantic.to_tensor,
                                        interpreter.InterpreterBuilder.create_dot)


# ---- what is prepared once

def prepare_member(holder: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A builtin without the check that somebody gives it the semantic, which is given here."""
    inner, semantic = getattr(member, "__wrapped__", member), TritonSemantic(builder)

    def prepared(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return inner(*args, **kwargs)

    scope.set_attr(holder, name, prepared)


interpreter._patch_attr = prepare_member
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": interpreter.tl, "core": core}))
interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


# ---- types and values

def block_of(cls: Any, element_ty: Any, shape: Any) -> Any:
    """One block type of an element and a shape, with what its tensors say of their shape."""
    key = element_ty.name, *shape
    if key not in _BLOCKS:
        sizes = [core._unwrap_if_constexpr(size) for size in shape]
        block = object.__new__(cls)
        _REAL_BLOCK(block, element_ty, sizes)
        block.of_tensors = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(core.math.prod(sizes))
        _BLOCKS[key] = _BLOCKS.setdefault((element_ty.name, *sizes), block)
    return _BLOCKS[key]


def make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensors if type.__class__ is core.block_type else _SCALAR


def make_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr


def numpy_dtype(type: Any) -> Any:
    if type.name not in _NUMPY:
        _NUMPY[type.name] = _REAL_NUMPY(type)
    return _NUMPY[type.name]


core.block_type.__new__, core.block_type.__init__ = block_of, lambda self, element_ty, shape: None
core.dtype.__eq__ = lambda self, other: self is other or _REAL_EQUAL(self, other)
core.tensor.__init__ = make_tensor
interpreter.TensorHandle.__init__ = make_handle
interpreter._get_np_dtype = numpy_dtype
TritonSemantic.to_tensor = lambda self, x, check_type=True: (
    x if x.__class__ is core.tensor else _REAL_VALUE(self, x, check_type))


# ---- operations

def sizes_of(value: Any) -> list[int]:
    return value.type.shape.values if value.type.__class__ is core.block_type else []


def spread(value: Any, shape: tuple[int, ...]) -> Any:
    """A tensor of the wanted shape without its own memory."""
    handle = value.handle
    if handle.data.size == 1 and handle.data.flags.c_contiguous:
        data = np.ndarray(shape, handle.data.dtype, handle.data, 0, (0,) * len(shape))
    else:
        data = np.broadcast_to(handle.data, shape)
    return core.tensor(interpreter.TensorHandle(data, handle.dtype.scalar), core.block_type(value.dtype, shape))


def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    left, right = sizes_of(lhs), sizes_of(rhs)
    if left == right:
        return lhs, rhs
    try:
        shape = np.broadcast_shapes(left, right)
    except ValueError:
        return _REAL_BROADCAST(self, lhs, rhs)  # which says what is wrong
    return tuple(value if sizes == [*shape] else spread(value, shape) for value, sizes in ((lhs, left), (rhs, right)))


def operands(self: Any, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
             arithmetic_check: bool = True, div_or_mod: bool = False) -> tuple[Any, Any]:
    """Two tensors that need no cast, and a tensor with a number that it met before, are not looked at again."""
    real = lambda: _REAL_OPERANDS(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
    if lhs.__class__ is core.tensor and rhs.__class__ is core.tensor:
        left, right = lhs.dtype, rhs.dtype
        same = left is right and not div_or_mod and not left.is_ptr()
        return self.broadcast_impl_value(lhs, rhs) if same or allow_lhs_ptr and left.is_ptr() and right.is_int() else real()
    value, number = (lhs, rhs) if lhs.__class__ is core.tensor else (rhs, lhs)
    if value.__class__ is not core.tensor or number.__class__ not in (int, float) or value.dtype.is_ptr():
        return real()
    key = value.type.name, number is lhs, number.__class__, number, arithmetic_check, div_or_mod
    if key not in _CONSTANTS:
        pair = real()
        kept, constant = pair[::-1] if number is lhs else pair
        if kept is not value:  # it was cast
            return pair
        _CONSTANTS[key] = constant
    return (_CONSTANTS[key], value) if number is lhs else (value, _CONSTANTS[key])


def expand_dims(self: Any, input: Any, axis: int) -> Any:
    sizes = [*sizes_of(input)]
    if not sizes:
        return _REAL_EXPAND(self, input, axis)
    sizes.insert(axis, 1)
    return core.tensor(interpreter.TensorHandle(input.handle.data.reshape(sizes), input.handle.dtype.scalar),
                       core.block_type(input.dtype, sizes))


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if a.data.dtype != np.int8 or b.data.dtype != np.int8 or a.data.shape[-1] * 2 ** 14 > EXACT:
        return _REAL_DOT(self, a, b, d, input_precision, max_num_imprecise_acc)
    sums = np.matmul(a.data.astype(np.float32), b.data.astype(np.float32))
    return interpreter.TensorHandle(sums.astype(d.data.dtype) + d.data, d.dtype.scalar)


TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_type_checking_impl = broadcast, operands
TritonSemantic.expand_dims, interpreter.InterpreterBuilder.create_dot = expand_dims, dot
