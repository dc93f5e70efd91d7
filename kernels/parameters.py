"""A kernel's parameters in memory, as the driver takes them: a descriptor is a tensor map, its shape and its strides.

What Triton's launcher does with every argument of every launch is done once here; a repeated launch writes addresses, and has
tensor maps encoded anew only where their address changed.
"""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

MAP_BYTES = 128
"""Of a CUtensorMap, which must begin at a multiple of 64."""
LINE = 128
SCRATCH = 2
"""Pointers that every kernel of Triton's has behind its own parameters: scratch memory that none of these uses."""
SCALARS = {"i32": "<i", "i64": "<q", "f32": "<f"}
"""How a type of number lies in memory, as `struct` says it."""
POINTER = "pointer"


class TensorMap(NamedTuple):
    """How a kernel reads a descriptor's tensor: swizzle and element type by the driver's numbers, bytes of an element, block.

    mended: an old driver's maps of small tensors are, as Triton does from 3.7 on.
    """

    swizzle: int
    element_bytes: int
    element_type: int
    block: list[int]
    mended: bool = False


class Argument(NamedTuple):
    """One of a kernel's arguments; type: POINTER (of a buffer), one of SCALARS, or how a descriptor's tensor is read."""

    type: str | TensorMap
    value: Any


class Encoder(Protocol):
    """The driver's cuTensorMapEncodeTiled, for a tensor of which all but the address stays."""

    def __call__(self, place: int, address: int) -> None:
        """Writes the tensor map of an address to memory."""


class Map:
    """A tensor map among the parameters, and the address that it was last encoded for."""

    __slots__ = ("encoded", "encoder", "place")

    def __init__(self, place: int, encoder: Encoder) -> None:
        self.place, self.encoder, self.encoded = place, encoder, None

    def encode(self, address: int) -> None:
        if address != self.encoded:
            self.encoder(self.place, address)
            self.encoded = address


class Parameters:
    """The parameters of one launch.

    pointers: what the driver reads, the address of each. addresses: (place among `words`, buffer) of those that are pointers;
    maps: (`Map`, buffer) of the descriptors. Neither is filled in yet.
    """

    def __init__(self, arguments: Sequence[Argument], driver: Any) -> None:
        pieces: list[tuple[str, Any]] = []  # struct's format, value
        descriptors: list[tuple[int, Any, TensorMap]] = []
        buffers: list[tuple[int, Any]] = []
        for type, value in arguments:
            if isinstance(type, TensorMap):
                descriptors.append((len(pieces), value, type))
                pieces.append((f"{MAP_BYTES}x", None))
                pieces += [("<i", length) for length in value.shape] + [("<q", stride) for stride in value.strides]
            elif type == POINTER:
                buffers.append((len(pieces), value))
                pieces.append(("<Q", 0))
            else:
                pieces.append((SCALARS[type], value))
        pieces += [("<Q", 0)] * SCRATCH
        offsets, end = [], 0
        for format, _ in pieces:
            step = LINE if format.endswith("x") else 8
            end = -(-end // step) * step
            offsets.append(end)
            end += struct.calcsize(format)
        self._memory = ctypes.create_string_buffer(end + LINE)
        shift = -ctypes.addressof(self._memory) % LINE
        for (format, value), offset in zip(pieces, offsets):
            if value is not None:
                struct.pack_into(format, self._memory, shift + offset, value)
        begin = ctypes.addressof(self._memory) + shift
        self.words = (ctypes.c_uint64 * (end // 8)).from_buffer(self._memory, shift)
        self.pointers = (ctypes.c_void_p * len(pieces))(*[begin + offset for offset in offsets])
        self.addresses = [(offsets[number] // 8, buffer) for number, buffer in buffers]
        self.maps = [(Map(begin + offsets[number], driver.tensor_map_encoder(read, value.shape, value.strides, value.padding)),
                      value.base) for number, value, read in descriptors]
