"""Rotary positions of tokens [B, N, H, D], as all frames apply them: interleaved pairs, computed in float32."""
from __future__ import annotations

from typing import Any

from ...runtime.protocol import Runtime


def rotated(runtime: Runtime, x: Any, rotary: tuple[Any, Any]) -> Any:
    """x [B, N, H, D] turned by (cos, sin), each [N, D]: (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin)."""
    cos, sin = rotary
    wide = x.float()
    pairs = wide.reshape([*wide.shape[:3], -1, 2])
    first, second = runtime.cut(pairs, 1, -1)
    turned = runtime.concat([-second, first], -1).reshape(wide.shape)
    out = wide * cos.reshape([1, cos.shape[0], 1, cos.shape[1]]) + turned * sin.reshape([1, sin.shape[0], 1, sin.shape[1]])
    return out.to(x.dtype)
