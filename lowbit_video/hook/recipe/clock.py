"""Where a model is in its denoising: told by the pipeline as host numbers, or read from the timestep that the model is given.

The pipelines of this project tell it (`denoising_step`), and nothing waits for the device. A model that another pipeline
calls, or nobody's, is looked at by a forward pre-hook: of a timestep t of N the share is 1 - t / N. It is read when the first
attention asks, once a call of the model, and on a GPU the host then waits for that number.
"""
from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from ...arguments import number, shown, whole
from ...errors import UnsupportedError
from ...graph.runners import register
from ...graph.tracing import torch_ops, traced_by_paddle, traced_by_torch
from ...runtime.detect import runtime_of
from ..report import transformer_of

TRAIN_TIMESTEPS = 1000
COUNT_DOWN = ("AllegroTransformer3DModel", "CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel",
              "HunyuanVideoTransformer3DModel", "LTXVideoTransformer3DModel", "LatteTransformer3DModel",
              "SD3Transformer2DModel", "WanTransformer3DModel")
"""Models, by class, whose timesteps fall from the schedule's last to its first; another may count up, as Mochi's does, or from
1 to 0, as Flux' does."""
TELL = "tell the step around the call: with lowbit_video.denoising_step(model, step, steps): ..."


@contextlib.contextmanager
def denoising_step(model_or_pipe: Any, step: int, steps: int) -> Iterator[None]:
    """Says that what runs within is a step of a denoising, for recipes that have rules for steps.

    model_or_pipe: as `apply` takes it. step: from 0. steps: how many there are.
    Needed only where the step cannot be known otherwise: the pipelines of `lowbit_video.pipelines` say it themselves, and of
    diffusers' CogVideoX, ConsisID, Allegro, Latte, SD3, Wan, HunyuanVideo and LTX it is known by the timestep.
    Raises ValueError or TypeError for a step that is not one of 0 to steps - 1.
    """
    steps = whole("steps", steps, 1)
    clock = clock_of(transformer_of(model_or_pipe))
    outer, clock.told = clock.told, whole("step", step, 0, steps - 1) / steps
    try:
        yield
    finally:
        clock.told = outer


def clock_of(model: Any) -> StepClock:
    """The model's clock, made when first asked for."""
    clock = getattr(model, "lowbit_clock", None)
    if clock is None:
        clock = model.lowbit_clock = StepClock()  # on the model, so that a copy has one of its own
    return clock


class StepClock:
    """A model's share of the denoising.

    told: what `denoising_step` says, or None. users: how many `apply` look at the model's timestep.
    """

    def __init__(self) -> None:
        self.told: float | None = None
        self.users = 0
        self._timestep: Any = None
        self._share: float | None = None
        self._place, self._train, self._key = 0, float(TRAIN_TIMESTEPS), None
        self._unknown = ""

    def share(self) -> float:
        """How much of the denoising is done before this step: 0 in the first one.

        Raises UnsupportedError outside of any step, and for a timestep that is not understood.
        """
        if self.told is not None:
            return self.told
        if self._timestep is None:
            raise UnsupportedError("the recipe has rules for steps, and this call is in no step of a denoising: "
                                   f"{self._unknown or 'the attention was not called by its model'}; {TELL}")
        if self._share is None:
            self._share = self._read(self._timestep)
        return self._share

    def tell(self, timestep: Any) -> None:
        """A call of the model begins, with this timestep."""
        self._timestep, self._share = timestep, None

    def install(self, model: Any, train_timesteps: Any = None) -> None:
        """Looks at the model's timesteps. train_timesteps: how many its schedule has; None: 1000."""
        self.users += 1
        if self.users > 1:
            return
        self._unknown = ""
        self._train = float(TRAIN_TIMESTEPS if train_timesteps is None else number("num_train_timesteps", train_timesteps))
        names = [base.__name__ for base in type(model).__mro__]
        takes = list(inspect.signature(type(model).forward).parameters)[1:]
        if not any(name in COUNT_DOWN for name in names) or "timestep" not in takes:
            self._unknown = f"the timesteps of {names[0]} are not known here (those of {', '.join(COUNT_DOWN)} are)"
            return
        self._place = takes.index("timestep")
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        if hasattr(model, "register_forward_post_hook"):
            model.register_forward_post_hook(self._end)
        else:
            model.register_forward_hook(self._end)
            self._key = torch_ops().key_of(register(self))

    def uninstall(self, model: Any) -> None:
        """Takes one `install` back."""
        self.users -= 1
        if self.users > 0:
            return
        self.tell(None)
        tables = [table for name, table in vars(model).items() if name.startswith("_forward_") and isinstance(table, dict)]
        ours = [key for table in tables for key, hook in table.items() if getattr(hook, "__self__", None) is self]
        for table in tables:
            for key in ours:
                table.pop(key, None)

    def _begin(self, model: Any, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """The forward pre-hook."""
        by_name = "timestep" in named
        timestep = named["timestep"] if by_name else given[self._place] if len(given) > self._place else None
        if traced_by_torch(timestep):
            from ...graph import torch_ops as operators  # an import statement is what torch can follow

            # what comes out is what goes on, so that nothing in the graph can come before it
            timestep = operators.step_op(timestep, self._key)
            if by_name:
                return given, {**named, "timestep": timestep}
            return (*given[:self._place], timestep, *given[self._place + 1:]), named
        if traced_by_paddle(timestep) and not isinstance(timestep, (int, float)):
            raise UnsupportedError("to_static traces the model's whole call, and a recipe with rules for steps reads its "
                                   "timestep: compile its blocks (pipe.compile()), or have a recipe without steps")
        self.tell(timestep)
        return None

    def _end(self, *call: Any) -> None:
        """The forward hook: the model is left."""
        if "torch" not in sys.modules or not sys.modules["torch"].compiler.is_compiling():
            self.tell(None)

    def _read(self, timestep: Any) -> float:
        values = [timestep]
        if not isinstance(timestep, (int, float)):
            values = runtime_of(timestep).to_numpy(timestep).reshape(-1).tolist()
        if len(set(values)) != 1:
            raise UnsupportedError(f"the model was called with several timesteps, {shown(values)}, and a recipe's rules for "
                                   f"steps need one; {TELL}")
        if not 0 <= values[0] <= self._train:
            raise UnsupportedError(f"the model was called with timestep {values[0]:g}, and its schedule has {self._train:g}; "
                                   f"{TELL}")
        return 1 - values[0] / self._train

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "told": None, "_timestep": None, "_share": None, "_key": self._key is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._key = torch_ops().key_of(register(self)) if state["_key"] else None  # a copy answers to a key of its own
