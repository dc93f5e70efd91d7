"""The Gluon names that the Hopper kernel uses, wherever the installed Triton keeps them.

Gluon is experimental: names move between minor versions of Triton. Every such name is met here and nowhere else, and
`why_not_gluon` says in words what is missing, so that selection can ask without a traceback. Where it is missing, stand-ins let
the launcher work all the same, for kernels that were shipped compiled.
"""
from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Arguments and meaning stay: Triton 3.7 renames thread_barrier, 3.8 async_copy_global_to_shared, 3.9 _reinterpret.
    block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
    _MISSING = None
except (ImportError, AttributeError) as error:
    from ..stand_in import TensorDescriptor, gl, gluon

    async_load = block_barrier = fence_async_shared = mbarrier = reinterpret = warpgroup_mma = warpgroup_mma_wait = None
    _MISSING = str(error)

__all__ = ["TensorDescriptor", "async_load", "block_barrier", "fence_async_shared", "gl", "gluon", "mbarrier",
           "reinterpret", "warpgroup_mma", "warpgroup_mma_wait", "why_not_gluon"]


def why_not_gluon() -> str | None:
    """What keeps the installed Triton from compiling the Hopper kernel, or None if nothing does."""
    if _MISSING is None:
        return None
    return f"it needs Triton with Gluon, 3.6 or later ({_MISSING}); pip install 'triton>=3.6'"
