"""What Triton compiled and launched once, as the CUDA driver launches it again.

Triton's own launcher binds every argument of every launch anew. What it hands the driver in the end is the same in all versions
named here: the parameters that were not compiled in, in their order, a descriptor as its tensor map, shape and strides, and two
pointers to scratch memory. `tests/kernels/test_compiled.py` holds both to the same bytes under the Triton at hand.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .driver_launch import DriverLaunch
from .parameters import POINTER, Argument, TensorMap

TRITONS = ("3.6.", "3.7.", "3.8.", "3.9.")
"""Beginnings of the versions whose launcher was read, and is compared."""
UNMENDED = "3.6."
"""Beginning of the versions that take a tensor map from the driver as it is."""
PLAIN = {"num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False,
         "launch_pdl": False, "instrumentation_mode": ""}
"""What the metadata says of a kernel whose launch needs no more than grid, threads, shared memory and parameters."""
MOST_SHARED = 228 * 1024
"""Bytes of shared memory beyond which a launch has to say so to the driver."""
NUMBERS = {"i32": "i32", "i64": "i64", "fp32": "f32"}
"""Triton's names of numbers, and those of `parameters.SCALARS`."""


def known(version: str) -> bool:
    """Whether what a version of Triton compiled can be repeated by the driver."""
    return version.startswith(TRITONS)


def driver_launch(compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> DriverLaunch | str:
    """The launch of a kernel by the driver; where Triton's own launcher must make it, why, in words.

    compiled: what Triton launched, its handles made. arguments: in the kernel's order, constants too.
    """
    version = sys.modules["triton"].__version__
    if not known(version):
        return f"the launcher of Triton {version} is not known"
    metadata = compiled.metadata
    for name, plain in PLAIN.items():
        found = getattr(metadata, name, plain)
        if found != plain:
            return f"{name} is {found!r}"
    warps, _, shared = compiled.packed_metadata
    if shared > MOST_SHARED:
        return f"it takes {shared} bytes of shared memory"
    given, maps = [], iter(getattr(metadata, "tensordesc_meta", None) or ())
    for name, type, value in zip(compiled.src.signature, compiled.src.signature.values(), arguments):
        if type == "constexpr":
            continue
        read = _type_of(type, maps, version)
        if read is None:
            return f"{name} is a {type}"
        given.append(Argument(read, value))
    return DriverLaunch(compiled.name, compiled.function, (*grid, 1, 1)[:3], warps, shared, tuple(given), compiled)


def _type_of(type: Any, maps: Any, version: str) -> str | TensorMap | None:
    """How a parameter of Triton's type is handed over; None where that is not known. maps: what is left of the descriptors'."""
    if not isinstance(type, str):
        return None
    if type.startswith("*"):
        return POINTER
    if not type.startswith("tensordesc"):
        return NUMBERS.get(type)
    found = next(maps, None)
    if found is None or found["fp4_padded"] or found.get("is_im2col"):
        return None
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    return TensorMap(found["swizzle"], found["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[found["elem_type"]], found["block_size"],
                     not version.startswith(UNMENDED))
