"""Triton's CPU interpreter without what it does beside interpreting; imported by files whose kernels run in it.

No result depends on what is left out, and it takes half of the time or more: integers are added and multiplied a second time,
in 64 bits, for an assertion that is off; `tl` is prepared again for every call of a device function; shapes and types are made
anew for every value.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import triton.language.core as core
from triton.runtime import interpreter

builder = interpreter.interpreter_builder
assert not builder.options.debug, "device_assert would look at what is computed for it"
builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

_SHAPES: dict[tuple[int, ...], tuple[Any, Any]] = {}
_BLOCKS: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
_NUMPY: dict[str, Any] = {}
_PREPARED: set[str] = set()
_REAL_BLOCK, _REAL_NUMPY = core.block_type.__init__, interpreter._get_np_dtype


def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A launch prepares its own `tl`; what other modules have of it stays prepared."""
    module = self.fn.__module__
    if module not in _PREPARED:
        interpreter._patch_lang(self.fn)
        _PREPARED.add(module)
    return self.rewrite()(*args, **kwargs)


def make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = element_ty.name, tuple(size if type(size) is int else core._unwrap_if_constexpr(size) for size in shape)
    if key not in _BLOCKS:
        _REAL_BLOCK(self, element_ty, shape)
        _BLOCKS[key] = vars(self).copy()
    vars(self).update(_BLOCKS[key])


def make_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    shape = tuple(type.shape) if type.is_block() else ()
    if shape not in _SHAPES:
        _SHAPES[shape] = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(core.math.prod(shape))
    self.shape, self.numel = _SHAPES[shape]


def numpy_dtype(type: Any) -> Any:
    if type.name not in _NUMPY:
        _NUMPY[type.name] = _REAL_NUMPY(type)
    return _NUMPY[type.name]


interpreter.InterpretedFunction.__call__ = call_device_function
core.block_type.__init__ = make_block_type
core.tensor.__init__ = make_tensor
interpreter._get_np_dtype = numpy_dtype
