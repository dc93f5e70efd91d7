"""Where a CogVideoX step's time goes, by part of the model, the same parts in PyTorch and in Paddle.

Hooks around sublayers leave a mark on the stream (on a CPU: the time) wherever one part ends and the next begins; the time
between two marks belongs to one part, so the parts add up to the step and nothing waits for the device. Hooks cost the host
some microseconds each: where the host is late, its delay counts for the part it falls in.
"""
from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from lowbit_video.hook.report import named_modules
from lowbit_video.runtime import cuda_driver
from lowbit_video.runtime.detect import runtime_of

from .. import timing
from .side import Side

EMBEDDINGS, FINAL, GATES, JOINING, ATTENTION = "embeddings", "final", "gates and residuals", "joining", "attention"
PARTS = {
    EMBEDDINGS: "patches, text, time, additive positions",
    "norms": "LayerNorm of tokens before attention and feed-forward",
    "modulation": "shift and scale of these norms, and the timestep's projection to them",
    JOINING: "text and video put together before the projections and taken apart behind them",
    "projections": "Q, K, V and output",
    "QK norms": "of Q and K; with a fused prologue in attention",
    ATTENTION: "rotary positions, quantisation, attention",
    "feed-forward": "two linear layers and GELU",
    GATES: "what a block does itself: gates, residuals, text and video put together for the feed-forward",
    FINAL: "last norms, modulation, output projection, patches to latents",
}
_BLOCK = r"transformer_blocks\.\d+"
_ROLES = {
    r"patch_embed|time_embedding|time_proj|ofs_embedding|ofs_proj|embedding_dropout": EMBEDDINGS,
    r"norm_final|norm_out|proj_out": FINAL,
    _BLOCK: GATES,
    _BLOCK + r"\.norm[12]": "modulation",
    _BLOCK + r"\.norm[12]\.norm": "norms",
    _BLOCK + r"\.attn1": JOINING,
    _BLOCK + r"\.attn1\.(to_[qkv]|to_out\.0)": "projections",
    _BLOCK + r"\.attn1\.norm_[qk]": "QK norms",
    _BLOCK + r"\.ff": "feed-forward",
}
"""The part that a sublayer's own time belongs to, by its name, the same in both frameworks."""
ROUNDS = 3
AHEAD_US = 5e3
"""So long the device is kept busy before a marked step, four times over: then the host is ahead of it."""


def role_of(name: str) -> str | None:
    """The part that a sublayer begins; None for one that is a piece of a part."""
    return next((part for pattern, part in _ROLES.items() if re.fullmatch(pattern, name)), None)


class Timeline:
    """Marks of one model's steps. mark: gives a mark of now; between(a, b): ms from one to another, once all have happened."""

    def __init__(self, model: Any, mark: Callable[[], Any], between: Callable[[Any, Any], float], fused: bool) -> None:
        """fused: leave the norms of Q and K alone, as a norm with hooks is not fused with quantisation."""
        self._mark, self._between = mark, between
        self._modules = {module: part for name, module in named_modules(model)
                         if (part := role_of(name)) and not (fused and part == "QK norms")}
        self._model = model
        self._layers = sum(part == GATES for part in self._modules.values())
        self._stack: list[str] = []
        self._marks: list[tuple[str, Any, float]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, steps of the model leave marks."""
        hooks = []
        after = "register_forward_post_hook" if hasattr(self._model, "register_forward_post_hook") else "register_forward_hook"
        try:
            for module, part in {self._model: EMBEDDINGS, **self._modules}.items():
                hooks.append(module.register_forward_pre_hook(lambda module, given, part=part: self._enter(part)))
                hooks.append(getattr(module, after)(lambda module, given, out, part=part: self._leave(part)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, part: str) -> None:
        if part == "projections" and self._stack[-1] == JOINING:
            self._stack[-1] = ATTENTION  # from the first projection on, what is between is attention
        self._begin([*self._stack, part])

    def _leave(self, part: str) -> None:
        """Back to the part around."""
        outer = self._stack[:-1]
        if part == "projections":
            self._projected += 1
            if self._projected % 4 == 0:  # the output's
                outer[-1] = JOINING
        if part == GATES and len(outer) == 1:
            self._blocks += 1
            outer[-1] = FINAL if self._blocks == self._layers else GATES
        self._begin(outer)

    def _begin(self, stack: list[str]) -> None:
        """What follows belongs to the innermost of these."""
        if len(self._stack) == 0:
            self._marks, self._projected, self._blocks = [], 0, 0
        self._stack = stack
        self._marks.append((stack[-1] if stack else "", self._mark(), time.perf_counter()))

    def parts(self) -> dict[str, dict[str, float]]:
        """Of the last step, by part: ms, host_ms and how many times it began."""
        ms, host, calls = defaultdict(float), defaultdict(float), Counter()
        for (part, mark, at), (_, later, then) in zip(self._marks, self._marks[1:]):
            ms[part] += self._between(mark, later)
            host[part] += (then - at) * 1e3
            calls[part] += 1
        return {part: dict(ms=ms[part], host_ms=host[part], calls=calls[part]) for part in PARTS if calls[part]}


def profile(side: Side, model: Any, method: str, step: Callable[[], Any], fused: bool) -> dict[str, Any]:
    """Where a step's time goes, and the host's part of it.

    Returns parts (by part ms and host_ms, medians of ROUNDS steps, and calls); marked_ms, their sum; host_ms, until a step
    without marks returns, the device idle at its beginning: as long as the device's queue has room no more than the host's own
    work; host_blocks_ms, as many times the quickest block as there are, which never waited for the queue; waits, as
    `side.waits` has it.
    """
    if side.device == "cpu":
        timeline = Timeline(model, time.perf_counter, lambda a, b: (b - a) * 1e3, fused)
        run, wait = step, lambda: None
    else:
        like = side.like()
        timer, stream = timing.Timer(runtime_of(like), like), runtime_of(like).stream(like)
        timeline = Timeline(model, lambda: _recorded(stream), lambda a, b: a.elapsed_ms(b), fused)
        run, wait = lambda: timer.sample(step, 1, AHEAD_US), timer.synchronize
    rounds = []
    with timeline.watching():
        step()
        for _ in range(ROUNDS):
            run()
            wait()
            rounds.append(timeline.parts())
    parts = {part: dict(ms=statistics.median(one[part]["ms"] for one in rounds),
                        host_ms=statistics.median(one[part]["host_ms"] for one in rounds), calls=rounds[0][part]["calls"])
             for part in rounds[0]}
    return dict(method=method, parts=parts, marked_ms=sum(part["ms"] for part in parts.values()),
                **_host(model, step, wait), waits=side.waits(step))


def _recorded(stream: int) -> cuda_driver.Event:
    event = cuda_driver.Event()
    event.record(stream)
    return event


def _host(model: Any, step: Callable[[], Any], wait: Callable[[], None]) -> dict[str, float]:
    """ms that steps without marks keep the host, and the quickest block's times their number."""
    begun: list[float] = []
    blocks = [module for name, module in named_modules(model) if re.fullmatch(_BLOCK, name)]
    hooks = [block.register_forward_pre_hook(lambda module, given: begun.append(time.perf_counter())) for block in blocks]
    whole, quickest = [], []
    try:
        for _ in range(ROUNDS):
            wait()
            begun.clear()
            begin = time.perf_counter()
            step()
            whole.append((time.perf_counter() - begin) * 1e3)
            quickest.append(min((later - one) * 1e3 for one, later in zip(begun, begun[1:])))
        wait()
    finally:
        for hook in hooks:
            hook.remove()
    return dict(host_ms=statistics.median(whole), host_blocks_ms=statistics.median(quickest) * len(blocks))
