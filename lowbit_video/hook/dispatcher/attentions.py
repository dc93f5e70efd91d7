"""What each of our names in diffusers' dispatcher runs."""
from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError
from .attention import DispatchedAttention
from .names import RECIPE, backend_names
from .watch import Watched


class OfCallers:
    """Each call by its module's recipe."""

    def serve(self, caller: Watched | None, *call: Any) -> tuple[Any, Any]:
        """As `DispatchedAttention.serve`. Raises UnsupportedError for a module that has no recipe."""
        if caller is None or caller.attention is None:
            raise UnsupportedError(f"diffusers' backend {RECIPE} was called by a module that has no recipe: it is set by "
                                   "lowbit_video.apply(model, recipe), and taken back by lowbit_video.remove(model)")
        return caller.attention.serve(caller, *call)


ATTENTIONS = {**{name: DispatchedAttention(name, *choices) for name, choices in backend_names().items()}, RECIPE: OfCallers()}
"""By the backend's name."""
