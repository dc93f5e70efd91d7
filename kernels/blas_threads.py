"""One BLAS thread while the NumPy reference runs.

Its products are small tiles, [512, 64] x [64, 128]: OpenBLAS splits them over its threads, which then spend
their time waiting for each other. On two busy cores that was many times slower than one thread.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_PREFIXES = ("scipy_openblas", "openblas")
_SUFFIXES = ("64_", "")


@functools.cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The getter and setter of NumPy's own OpenBLAS; None where NumPy brings another BLAS."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                continue
            for prefix in _PREFIXES:
                for suffix in _SUFFIXES:
                    get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                    put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                    if get is not None and put is not None:
                        return get, put
    return None


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """NumPy's matrix products use one thread inside, and as many as before after; also a decorator."""
    controls = _controls()
    if controls is None:
        yield
        return
    get, put = controls
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)
