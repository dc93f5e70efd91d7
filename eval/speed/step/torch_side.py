"""PyTorch's side of `bench step`: diffusers' models, torch.compile, CUDA's counters."""
from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile, record_function

from .kernel_parts import RANGE
from .methods import methods_of, why_not
from .models import MODELS, StepModel

CALLED = "called a synchronizing CUDA operation"
"""What PyTorch warns of; that it may not see all of them it says once a process, in other words, which is no wait."""


class TorchSide:
    """A `side.Side`. Modes: as it is; its repeated blocks compiled; the whole model compiled, without a break (`fullgraph`)."""

    name = "torch"
    modes: Mapping[str, str] = {"eager": "", "blocks": "", "model": ""}

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.no_kernels = "" if self.device == "cuda" else "a CPU has none"
        logging.set_verbosity_error()

    def gpu_name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "no GPU"

    def entry(self, name: str) -> StepModel:
        return MODELS[name]

    def make(self, entry: StepModel, tiny: bool) -> tuple[Any, dict[str, Any]]:
        return entry.make(self.device, torch.float32 if self.device == "cpu" else torch.bfloat16, tiny)

    def why_not(self, method: str, entry: StepModel) -> str | None:
        return why_not(method, self.device, entry.dispatches, entry.fuses)

    def methods_of(self, model: Any, entry: StepModel, names: Sequence[str], leading_keys: int | None
                   ) -> contextlib.AbstractContextManager[Mapping[str, Any]]:
        return methods_of(model, entry.dispatches, list(names), leading_keys)

    def step(self, model: Any, given: dict[str, Any], way: Any) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            with torch.no_grad(), way.active():
                return model(**given, return_dict=False)[0]

        return step

    def begin_mode(self, model: Any, mode: str) -> None:
        """Compiles in place, so that a method's processors and backends are the model's own."""
        torch._dynamo.reset()
        counters.clear()
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        how = dict(fullgraph=True, backend="inductor" if self.device == "cuda" else "eager")
        for module in model.modules():
            module._compiled_call_impl = None
        if mode == "blocks":
            for block in (block for part in model.children() if isinstance(part, torch.nn.ModuleList) for block in part):
                block.compile(**how)  # blocks of a kind share a graph; CogVideoX names none as repeated
        elif mode == "model":
            model.compile(**how)

    def graphs(self) -> int:
        return counters["stats"]["unique_graphs"]

    def breaks(self) -> dict[str, int]:
        return dict(counters["graph_break"])

    def run(self, step: Callable[[], Any]) -> tuple[Any, float | None]:
        if self.device == "cpu":
            return step(), None
        torch.cuda.reset_peak_memory_stats()
        return step(), torch.cuda.max_memory_allocated() / 2**30

    def waits(self, step: Callable[[], Any]) -> dict[str, Mapping[str, int] | None]:
        """By where in the code PyTorch itself says that an operation waits for the device."""
        if self.device == "cpu":
            return {"reads": None, "on the CPU": {}}
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return {"reads": dict(Counter(f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in told
                                      if CALLED in str(one.message))), "on the CPU": {}}

    def trace(self, step: Callable[[], Any], modules: Sequence[torch.nn.Module]) -> list[dict[str, Any]]:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        with profile(activities=activities):
            self.like().add_(1)  # what the first profile sets up would be missing from it, or in it
        self._wait()
        with _ranges(modules), profile(activities=activities) as taken:
            step()
            self._wait()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            taken.export_chrome_trace(str(file))
            return json.loads(file.read_text(encoding="utf-8", errors="replace"), strict=False)["traceEvents"]

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def like(self) -> torch.Tensor:
        return torch.empty(1, device=self.device)

    def release(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _ranges(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, a profiler is told while one of the modules runs."""
    begun: list[record_function] = []

    def begin(module: torch.nn.Module, given: Any) -> None:
        begun.append(record_function(RANGE))
        begun[-1].__enter__()

    def end(module: torch.nn.Module, given: Any, out: Any) -> None:
        begun.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as undo:
        for module in modules:
            undo.callback(module.register_forward_pre_hook(begin).remove)
            undo.callback(module.register_forward_hook(end).remove)
        yield
