"""Paddle models with random weights, made on the device: no file is read, and little travels from the host."""
from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit_video.runtime import detect


def random_paddle(make: Callable[[], Any], dtype: str, spread: Callable[[str, list[int]], float]) -> Any:
    """A Paddle model in a dtype, on Paddle's current device, in evaluation mode.

    spread: of a parameter's name and shape, its standard deviation; 0 leaves a weight one and a bias zero.
    """
    import paddle

    initializer = paddle.nn.initializer
    paddle.set_default_dtype(dtype)
    initializer.set_global_initializer(initializer.Constant(1.0), initializer.Constant(0.0))
    try:
        model = make()
    finally:
        initializer.set_global_initializer(None)
        paddle.set_default_dtype("float32")
    model.eval()
    with paddle.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if deviation := spread(name, parameter.shape):
                randomise(parameter, number, deviation)
    return model


def randomise(parameter: Any, seed: int, spread: float) -> None:
    """Gives a parameter normal values of this standard deviation, drawn where it is."""
    runtime = detect.runtime_of(parameter)
    if runtime.is_cpu(parameter):
        values = np.random.default_rng(seed).standard_normal(parameter.shape, np.float32) * np.float32(spread)
        parameter.set_value(runtime.from_numpy(values, parameter, runtime.dtype_name(parameter)))
        return
    from .inputs import fill_normal

    with runtime.launch_guard(parameter):
        fill_normal(parameter, (1, 1, 1, math.prod(parameter.shape)), seed)
    parameter.scale_(spread)


def fan_in(shape: list[int]) -> int:
    """How many inputs an output of this weight has: [in, out] of a linear layer, [out, in, ...] of a convolution."""
    return shape[0] if len(shape) == 2 else math.prod(shape[1:])


class RandomWeights:
    """What stands in for a model's weights in files (`StoredWeights`): made where they are to be, each time the same.

    spread: as for `random_paddle`. seconds: what it took, one number for each time.
    """

    def __init__(self, dtype: str, spread: Callable[[str, list[int]], float]) -> None:
        self.dtype, self._spread = dtype, spread
        self.seconds: list[float] = []

    def read(self, model: Any) -> None:
        """Gives the model's parameters memory and values, on Paddle's current device."""
        import paddle

        begin = time.perf_counter()
        in_float32 = getattr(model, "float32_tensors", ()) if self.dtype == "float16" else ()
        with paddle.no_grad():
            for number, (name, parameter) in enumerate(model.state_dict().items()):
                dtype = "float32" if any(re.search(pattern, name) for pattern in in_float32) else self.dtype
                tensor = paddle.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype)
                if deviation := self._spread(name, parameter.shape):
                    randomise(tensor, number, deviation)
                tensor._share_buffer_to(parameter)
        if (device := paddle.get_device()) != "cpu":
            paddle.device.synchronize(device)
        self.seconds.append(time.perf_counter() - begin)
