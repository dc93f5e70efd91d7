"""Whether a call is being traced into a graph, and by whom; asked of every call, so it imports nothing."""
from __future__ import annotations

import importlib
import sys
from typing import Any


def _is_torch(q: Any) -> bool:
    return "torch" in sys.modules and isinstance(q, sys.modules["torch"].Tensor)


def traced_by_torch(q: Any) -> bool:
    """Whether torch.compile traces this call."""
    return _is_torch(q) and sys.modules["torch"].compiler.is_compiling()


def traced_by_paddle(q: Any) -> bool:
    """Whether to_static traces this call: its AST mode builds a program, its SOT mode simulates the bytecode."""
    if "paddle" not in sys.modules or _is_torch(q):
        return False
    paddle = sys.modules["paddle"]
    simulated = getattr(paddle.base.dygraph.base, "in_sot_simulation_mode", None)  # not in every version
    return not paddle.in_dynamic_mode() or (simulated is not None and simulated())


def paddle_ops() -> Any:
    """The module of Paddle's static operators."""
    name = "lowbit_video.graph.paddle_ops"  # Paddle's tracers follow no import statement
    return sys.modules[name] if name in sys.modules else importlib.import_module(name)


def torch_ops() -> Any:
    """The module of torch's operators."""
    return importlib.import_module("lowbit_video.graph.torch_ops")
