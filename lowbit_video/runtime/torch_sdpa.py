"""torch's `scaled_dot_product_attention`, served by another function while a context lasts, in this thread."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Serving(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` go to `serve`, with the arguments as they were given; all else runs as ever.

    Nothing of torch is changed: a function mode is torch's own way in, and what `serve` itself calls does not come here again.

    Source: diffusers skips attention the same way (`hooks/layer_skip.py`).
    """

    def __init__(self, serve: Callable) -> None:
        super().__init__()
        self._serve = serve

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.unflatten:  # torch.compile cannot trace this method under a mode: it calls super()
            func = torch.unflatten
        return (self._serve if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))
