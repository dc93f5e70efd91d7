"""A kernel's parameters in memory, as the driver takes them: a descriptor is a tensor map, its shape and its strides.

What Triton's launcher does with every argument of every launch is done once here; a repeated launch writes addresses, and has
tensor maps encoded anew only where their address changed.
"""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, Protocol

from .store import Build, TensorMap

MAP_BYTES = 128
"""Of a CUtensorMap, which must begin at a multiple of 64."""
LINE = 128
SCRATCH = 2
"""Pointers that every kernel of Triton's has behind its own parameters: scratch memory that none of these uses."""
SCALARS = {"i32": "<i", "i64": "<q", "f32": "<f"}
"""How a kind lies in memory, as `struct` says it."""


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

    def __init__(self, build: Build, values: Sequence[Any], driver: Any) -> None:
        pieces: list[tuple[str, Any]] = []  # struct's format, value
        descriptors: list[tuple[int, Any, TensorMap]] = []
        buffers: list[tuple[int, Any]] = []
        known = iter(build.maps)
        for kind, value in zip(build.kinds, values):
            plain = kind.partition("/")[0]
            if kind.startswith("tma"):
                descriptors.append((len(pieces), value, next(known)))
                pieces.append((f"{MAP_BYTES}x", None))
                pieces += [("<i", length) for length in value.shape] + [("<q", stride) for stride in value.strides]
            elif kind.startswith("*"):
                buffers.append((len(pieces), value))
                pieces.append(("<Q", 0))
            elif plain in SCALARS:
                pieces.append((SCALARS[plain], value))
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
        self.maps = [(Map(begin + offsets[number], driver.tensor_map_encoder(known.element_type, known.element_bytes,
                                                                               known.swizzle, known.block, value.shape,
                                                                               value.strides, value.padding)), value.base)
                     for number, value, known in descriptors]
