"""Models whose weights are in the device's memory only while they are needed: read from their files, released again.

What is built without its weights knows where they lie (`Model.stored`). Nothing holds a copy of them in between but the
system's own cache of files.
"""
from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import paddle

from .device_memory import release_cached
from .weights import Model


class OnDemand:
    """Of several models, at most one has its weights in memory.

    A model that is called gets them, whoever calls it. Threads take turns where they say what they need.
    """

    def __init__(self, device: str, models: Sequence[Model]) -> None:
        """models: built with `Model.from_pretrained(..., read=False)`."""
        self._device, self._models = device, tuple(models)
        self._sums: dict[int, np.ndarray] = {}  # of the models whose weights are here, as they were read
        self._users = [0] * len(self._models)
        self._turn = threading.RLock()
        for number, model in enumerate(self._models):
            model.register_forward_pre_hook(lambda layer, inputs, number=number: self._bring(number))

    @contextlib.contextmanager
    def needed(self, model: object, now: bool = False) -> Iterator[None]:
        """After the block, and the blocks around it that need the same model, its weights are in memory no longer.

        model: what is none of these models is left alone. now: its weights are there already where the block begins.
        """
        number = next((number for number, one in enumerate(self._models) if one is model), None)
        if number is None:
            yield
            return
        with self._turn:
            self._users[number] += 1
            try:
                if now:
                    self._bring(number)
                yield
            finally:
                self._users[number] -= 1
                if not self._users[number]:
                    self._release(number)

    def _bring(self, number: int) -> None:
        if number in self._sums:
            return
        for other in list(self._sums):
            self._release(other)
        model, before = self._models[number], paddle.get_device()
        paddle.set_device(self._device)
        try:
            model.stored.read(model)
        finally:
            paddle.set_device(before)
        self._sums[number] = _sums(model)

    def _release(self, number: int) -> None:
        """Frees the memory of the weights. Those that were changed since they were read stay: they are in no file."""
        model = self._models[number]
        if number not in self._sums or model.stored is None:
            return
        if not np.array_equal(_sums(model), self._sums[number], equal_nan=True):
            model.stored = None
            warnings.warn(f"weights of the {type(model).__name__} were changed after they were read, so they stay in memory: "
                          "their files do not hold them. For less memory save the changed model and load that", stacklevel=4)
            return
        del self._sums[number]
        for tensor in model.state_dict().values():
            tensor._clear_data()
        release_cached(self._device)


def _sums(model: Model) -> np.ndarray:
    """A number for each tensor, another one where its values are others."""
    with paddle.no_grad():
        return paddle.stack([tensor.astype("float32").sum() for tensor in model.state_dict().values()]).numpy()
