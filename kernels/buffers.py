"""Buffer: an address and a dtype, all that a Triton launch needs to know of a tensor, and whose memory that is.

Launchers reinterpret every tensor through it, so that Triton sees neither Paddle nor PyTorch, and byte
codes can be read as FP8. Its other methods are what Triton's CPU interpreter asks of an argument before it
copies it to the host; the memory already is on the host there, hence they return the buffer itself.
"""
from __future__ import annotations

from typing import Any, NamedTuple

_ITEM_SIZES = {"int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "int64": 8}


class DType(str):
    """A dtype name that knows its size in bytes, as Triton's TensorDescriptor asks for it."""

    @property
    def itemsize(self) -> int:
        return _ITEM_SIZES[self]


_DTYPES = {name: DType(name) for name in _ITEM_SIZES}


class Origin(NamedTuple):
    """Which of a call's tensors a buffer lies in, by name, and how many bytes from its beginning."""

    tensor: str
    offset: int = 0


class Buffer:
    """Memory at `address` read as `dtype` (a name such as "float16"); does not own it. origin: None where nobody asks."""

    __slots__ = ("address", "dtype", "origin")

    def __init__(self, address: int, dtype: str, origin: Origin | None = None):
        self.address = address
        self.dtype = _DTYPES[dtype]
        self.origin = origin

    def data_ptr(self) -> int:
        return self.address

    def at(self, offset: int, dtype: str) -> Buffer:
        """What lies `offset` bytes further on, read as `dtype`."""
        origin = self.origin and Origin(self.origin.tensor, self.origin.offset + offset)
        return Buffer(self.address + offset, dtype, origin)

    def _same(self, *args: Any, **kwargs: Any) -> Buffer:
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = storage_offset = size = stride = _same


def dtype_name(tensor: Any) -> str:
    """The bare dtype name of a Paddle, PyTorch or NumPy array or a Buffer, such as "float16"."""
    return str(tensor.dtype).rpartition(".")[2]


def as_buffer(tensor: Any, dtype: str | None = None) -> Buffer | None:
    """`tensor` as a Buffer, read as `dtype` if one is given; None stays None."""
    if tensor is None:
        return None
    return Buffer(tensor.data_ptr(), dtype or dtype_name(tensor), getattr(tensor, "origin", None))
