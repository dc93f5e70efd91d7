"""Whether a call is being traced into a graph, and by whom; asked of every call, so it imports nothing."""
from __future__ import annotations

import importlib
import sys
from typing import Any

from .. import runtime

_PACKAGE = sys.modules[__package__]


def _paddle_of(q: Any) -> Any:
    """Paddle, where its runtime is loaded and this is its tensor: a package has as attributes what is loaded of it.

    To look for one module in `sys.modules`, Paddle's SOT wraps and guards all of them, which takes most of a trace.
    """
    loaded = getattr(runtime, "paddle_runtime", None)
    return loaded.paddle if loaded is not None and isinstance(q, loaded.paddle.Tensor) else None


def _is_torch(q: Any) -> bool:
    return _paddle_of(q) is None and "torch" in sys.modules and isinstance(q, sys.modules["torch"].Tensor)


def traced_by_torch(q: Any) -> bool:
    """Whether torch.compile traces this call."""
    return _is_torch(q) and sys.modules["torch"].compiler.is_compiling()


def traced_by_paddle(q: Any) -> bool:
    """Whether to_static traces this call: its AST mode builds a program, its SOT mode simulates the bytecode."""
    paddle = _paddle_of(q)
    if paddle is None:
        if "paddle" not in sys.modules or _is_torch(q):
            return False
        paddle = sys.modules["paddle"]
    simulated = getattr(paddle.base.dygraph.base, "in_sot_simulation_mode", None)  # not in every version
    return not paddle.in_dynamic_mode() or (simulated is not None and simulated())


def paddle_ops() -> Any:
    """The module of Paddle's static operators."""
    # Paddle's tracers follow no import statement
    return getattr(_PACKAGE, "paddle_ops", None) or importlib.import_module("lowbit_video.graph.paddle_ops")


def torch_ops() -> Any:
    """The module of torch's operators."""
    return importlib.import_module("lowbit_video.graph.torch_ops")
