"""A way to compute a model's attention: what is around its step, and the processors that its modules have meanwhile."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lowbit_video
from lowbit_video.hook.base import set_processor
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.precision import names_recipe

from .names import APART, pools, precision_of


@dataclass(frozen=True)
class Method:
    """One way, set up for a model. context: makes what is around the step. put: gives the model's modules its processors."""

    name: str
    context: Callable[[], contextlib.AbstractContextManager]
    put: Callable[[], None]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While it lasts the model's attention is computed this way."""
        self.put()
        with self.context():
            yield


def apply_ours(model: Any, method: str) -> None:
    """Hooks a model as users do, at the precision, rung or recipe that a method names."""
    wanted = precision_of(method)
    lowbit_video.apply(model, Recipe.load(wanted) if names_recipe(wanted) else wanted,
                       fallback=None if pools(method) else "exact", fused_prologue=False if method.endswith(APART) else None)


def set_processors(processors: dict[Any, Any]) -> None:
    """Gives each module its own."""
    for module, processor in processors.items():
        set_processor(module, processor)
