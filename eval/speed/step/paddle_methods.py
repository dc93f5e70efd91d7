"""The ways a Paddle model's attention is computed while its step is timed: Paddle's own, ours, and none at all."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lowbit_video
from lowbit_video.hook.base import AttnProcessor
from lowbit_video.hook.report import attention_modules
from lowbit_video.runtime.detect import runtime_of

from .names import NONE, PADDLE, TITLES
from .ways import Method, apply_ours, set_processors


def why_not(method: str, device: str) -> str | None:
    """Why a method is left out on a device, as Paddle names it, or None."""
    if method in TITLES and method not in (PADDLE, NONE):
        return "it takes PyTorch's tensors"
    if method == PADDLE and device != "cpu" and not device.startswith("gpu"):
        return f"on {device} Paddle's own attention holds the products of all queries and keys in memory"
    return None


class PaddleAttention(AttnProcessor):
    """What Paddle computes by itself, at any length."""

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        self.note("Paddle's own")
        return runtime_of(q).exact_attention(q, k, v, is_causal=is_causal, scale=scale)


class NoAttention(AttnProcessor):
    """As if attention took no time: the queries."""

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        return q


@contextlib.contextmanager
def methods_of(model: Any, names: list[str]) -> Iterator[dict[str, Method]]:
    """Methods by name for a model, which is as before afterwards."""
    modules = list(attention_modules(model).values())
    plain = {module: module.processor for module in modules}
    kinds = {PADDLE: PaddleAttention, NONE: NoAttention}
    put: dict[str, dict[Any, Any]] = {}
    try:
        for name in names:
            if name in kinds:
                put[name] = dict.fromkeys(modules, kinds[name]())
            else:
                apply_ours(model, name)
                put[name] = {module: module.processor for module in modules}
        yield {name: Method(name, contextlib.nullcontext, lambda own=own: set_processors(own)) for name, own in put.items()}
    finally:
        lowbit_video.remove(model)
        set_processors(plain)
