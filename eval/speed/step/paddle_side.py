"""Paddle's side of `bench step`: this project's CogVideoX, to_static, Paddle's counters of memory."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paddle

from lowbit_video.pipelines.shared import device_memory
from lowbit_video.pipelines.shared.compiling import compiled, readable_failures
from lowbit_video.runtime import cuda_driver, paddle_runtime

from .names import fuses
from .paddle_methods import methods_of, why_not
from .paddle_models import MODELS, PaddleModel
from .waits import fallbacks_of, prepare, reads_of


class PaddleSide:
    """A `side.Side`. Modes: as it is; all its blocks one graph, whose attention is one operator a block."""

    name = "paddle"
    modes: Mapping[str, str] = {"eager": "", "blocks": "", "model": "what surrounds the blocks stays eager in Paddle"}
    no_kernels = "Paddle's are not told apart; --profile times the parts of its model"

    def __init__(self) -> None:
        prepare()
        self.device = paddle_runtime.default_device()
        paddle.set_device(self.device)
        self._mode = "eager"
        self._graphs: dict[str, Any] = {}

    def gpu_name(self) -> str:
        like = self.like()
        ordinal = cuda_driver.device_of_pointer(like.data_ptr()) if self.device != "cpu" else None
        return "no GPU" if ordinal is None else cuda_driver.device_name(ordinal)

    def entry(self, name: str) -> PaddleModel:
        return MODELS[name]

    def make(self, entry: PaddleModel, tiny: bool) -> tuple[Any, dict[str, Any]]:
        return entry.make("float32" if self.device == "cpu" else "bfloat16", tiny)

    def why_not(self, method: str, entry: PaddleModel) -> str | None:
        return why_not(method, self.device)

    def methods_of(self, model: Any, entry: PaddleModel, names: Sequence[str], leading_keys: int | None
                   ) -> contextlib.AbstractContextManager[Mapping[str, Any]]:
        return methods_of(model, list(names))

    def step(self, model: Any, given: dict[str, Any], way: Any) -> Callable[[], paddle.Tensor]:
        graph = way.name if fuses(way.name) else ""  # the others share one: it runs what processors there are

        def step() -> paddle.Tensor:
            with paddle.no_grad(), way.active(), readable_failures():
                if self._mode == "eager":
                    return model(**given)
                if graph not in self._graphs:
                    self._graphs[graph] = compiled(model).run_blocks
                model.run_blocks = self._graphs[graph]
                try:
                    return model(**given)
                finally:
                    del model.run_blocks

        return step

    def begin_mode(self, model: Any, mode: str) -> None:
        self._mode, self._graphs = mode, {}

    def graphs(self) -> None:
        return None

    def breaks(self) -> dict[str, int]:
        return {}  # `full_graph=True`: what cannot be traced is an error

    def run(self, step: Callable[[], Any]) -> tuple[Any, float | None]:
        if not device_memory.tells(self.device):
            return step(), None
        device_memory.restart_peak(self.device)
        return step(), device_memory.peak_gib(self.device)

    def waits(self, step: Callable[[], Any]) -> dict[str, Mapping[str, int] | None]:
        return {"reads": reads_of(step), "on the CPU": fallbacks_of(step)}

    def like(self) -> paddle.Tensor:
        return paddle_runtime.anchor(self.device)

    def release(self) -> None:
        device_memory.release_cached(self.device)
