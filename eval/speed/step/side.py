"""What a framework does for a step that is measured; `torch_side` and `paddle_side` have one each."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Side(Protocol):
    """One framework on its device. Models are those of the framework's table, tensors its own.

    name: as in `names.FRAMEWORKS`. device: as the framework names it; "cpu" has no clock of its own. modes: those it knows.
    no_kernels: "", or why `trace` cannot be asked.
    """

    name: str
    device: str
    modes: Mapping[str, str]
    """What `--modes` takes -> "", or why the framework has no such mode."""
    no_kernels: str

    def gpu_name(self) -> str:
        """The card; "no GPU" where there is none."""

    def entry(self, name: str) -> Any:
        """A model's row of the table."""

    def make(self, entry: Any, tiny: bool) -> tuple[Any, dict[str, Any]]:
        """(model, what its forward takes), always the same values for a device."""

    def why_not(self, method: str, entry: Any) -> str | None:
        """Why a method is left out, or None."""

    def methods_of(self, model: Any, entry: Any, names: Sequence[str], leading_keys: int | None
                   ) -> contextlib.AbstractContextManager[Mapping[str, Any]]:
        """Methods (`ways.Method`) by name for a model, which is as before afterwards."""

    def step(self, model: Any, given: dict[str, Any], way: Any) -> Callable[[], Any]:
        """What runs one step by a method and returns the prediction."""

    def begin_mode(self, model: Any, mode: str) -> None:
        """Makes the steps that follow run eagerly or compiled."""

    def graphs(self) -> int | None:
        """How many graphs were compiled since the mode began; None where the framework does not tell."""

    def breaks(self) -> Mapping[str, int]:
        """Where those graphs broke, and how often."""

    def run(self, step: Callable[[], Any]) -> tuple[Any, float | None]:
        """A step's prediction, and the most GiB that tensors had while it ran, weights included; None where the device does
        not tell."""

    def waits(self, step: Callable[[], Any]) -> dict[str, Mapping[str, int] | None]:
        """What makes the host wait for the device in a step: "reads" by what reads a tensor on the host, "on the CPU" by
        operator that the device lacks; None of what the framework does not tell here."""

    def trace(self, step: Callable[[], Any], modules: Sequence[Any]) -> list[dict[str, Any]]:
        """What a profiler tells of one step, as events of a trace in Chrome's format, times in us; `modules` are told as
        `kernel_parts.RANGE` while they run. The step has run before."""

    def like(self) -> Any:
        """A small tensor on the device."""

    def release(self) -> None:
        """Gives memory of models that are gone back to the device."""
