"""Which framework a tensor belongs to, found from the tensor itself: nothing is imported that is not there already."""
from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from ..arguments import shown
from ..installing import pip_install
from .protocol import Runtime


def runtime_of(tensor: Any) -> Runtime:
    """The runtime (a module of this package) of a Paddle or torch tensor.

    Raises TypeError for anything else; a NumPy array is told how to become a tensor.
    Source: the way einops finds its backend (sys.modules first, then the type).
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, getattr(torch, "Tensor", ())):
        from . import torch_runtime

        return torch_runtime
    paddle = sys.modules.get("paddle")
    if paddle is not None and (isinstance(tensor, getattr(paddle, "Tensor", ())) or _is_static(paddle, tensor)):
        from . import paddle_runtime

        return paddle_runtime
    hint = "; wrap a NumPy array with paddle.to_tensor(array)" if type(tensor).__module__ == "numpy" else ""
    raise TypeError(f"expected a Paddle or torch tensor, got {type(tensor).__module__}.{type(tensor).__qualname__}{hint}")


def _is_static(paddle: Any, value: Any) -> bool:
    """Whether it is a variable of a Paddle program being traced (to_static)."""
    kinds = (getattr(getattr(paddle, "pir", None), "Value", None), getattr(paddle.static, "Variable", None))
    return isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))


def same_runtime(**tensors: Any) -> Runtime:
    """The runtime of all the named tensors; TypeError where they belong to different frameworks."""
    found = {name: runtime_of(tensor) for name, tensor in tensors.items()}
    if len({id(runtime) for runtime in found.values()}) > 1:
        kinds = ", ".join(f"{name} is a {runtime.NAME} tensor" for name, runtime in found.items())
        raise TypeError(f"all tensors must belong to one framework: {kinds}")
    return next(iter(found.values()))


def default_paddle_device() -> str:
    """What device="auto" means for Paddle: "gpu:0" if there is one, else a CUDA-backed custom device, else "cpu"."""
    from . import paddle_runtime

    return paddle_runtime.default_device()


def default_framework() -> str:
    """"paddle" or "torch": the one already imported (Paddle first), else the one installed (Paddle first).

    Raises ImportError where neither is.
    """
    for found in (lambda name: name in sys.modules, importlib.util.find_spec):
        for name in ("paddle", "torch"):
            if found(name):
                return name
    raise ImportError(f"neither Paddle nor PyTorch is installed; {pip_install('cpu')}, or paddlepaddle-gpu from Paddle's own "
                      f"index; for PyTorch, {pip_install('torch')}")


def runtime_named(framework: str) -> Runtime:
    """The runtime of "paddle" or "torch"; imports the framework."""
    if not isinstance(framework, str) or framework not in ("paddle", "torch"):
        raise ValueError(f"unknown framework {shown(framework)}; there are: paddle, torch")
    return importlib.import_module(f"lowbit_video.runtime.{framework}_runtime")


def anchor(framework: str | None = None, device: str = "auto") -> Any:
    """A small tensor of a framework on a device, to stand for that place: where `runtime.empty(..., like=anchor)` allocates.

    Raises ValueError for a framework or device that is not there.
    """
    runtime = runtime_named(default_framework() if framework is None else framework)
    try:
        if not isinstance(device, str):
            raise TypeError(f"a {type(device).__name__} names none")
        return runtime.anchor(device)
    except Exception as error:  # a framework's own error has any type
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(f"device is {shown(device)}, where {runtime.NAME} makes no tensor ({reason[-1]}); give 'auto', "
                         "'cpu' or a GPU as the framework names it") from error
