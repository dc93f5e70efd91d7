"""Triton and its language, where it is installed, else what stands in for them."""
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:
    from .stand_in import tl, triton

__all__ = ["tl", "triton"]
