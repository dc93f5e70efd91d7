"""The ways to compute a step's attention, by the names that `--methods` takes and the titles that tables have."""
from __future__ import annotations

from pathlib import Path

from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.precision import names_recipe
from lowbit_video.rung import as_rung

APART = " apart"
"""Behind a precision or a recipe: norms and positions are computed before attention, each in a pass of its own."""

FRAMEWORKS = {"torch": "PyTorch", "paddle": "Paddle"}
PYTORCH, PADDLE, SAGE, NONE, OURS = "pytorch", "paddle", "sage", "none", "exact"
OTHERS = {PYTORCH: "PyTorch", "fa2": "FlashAttention-2", "cudnn": "cuDNN", "fa4": "FlashAttention-4"}
EXACT = {**OTHERS, PADDLE: "Paddle", OURS: "exact, ours"}
"""Exact methods. PyTorch and Paddle: what they choose by themselves. Ours: what `apply(model, "exact")` does."""
TITLES = {**OTHERS, PADDLE: EXACT[PADDLE], SAGE: "SageAttention", NONE: "no attention"}
"""Methods that are not this project's."""
DEFAULT = {"torch": (*OTHERS, SAGE, "int8+fp8", "int8+fp16", NONE), "paddle": (PADDLE, OURS, "int8+fp8", "int8+fp16", NONE)}
"""What is timed unless other methods are named, by framework."""


def precision_of(method: str) -> str:
    """The precision or recipe of a method that may be followed by APART."""
    return method.removesuffix(APART)


def pools(method: str) -> bool:
    """Whether a method may keep a part of the keys only."""
    return method not in TITLES and (names_recipe(precision_of(method)) or as_rung(precision_of(method))[1] is not None)


def fuses(method: str) -> bool:
    """Whether a method computes norms and positions in the same readings of q and k as quantisation, where a model lets it;
    a recipe may, by its rungs."""
    return method not in (*TITLES, OURS) and not method.endswith(APART) and (names_recipe(method) or not pools(method))


def with_apart(names: list[str]) -> list[str]:
    """The methods, and behind each of ours at low bit the same with norms and positions apart."""
    alone = {*TITLES, OURS}
    return [one for name in names for one in ([name] if name in alone or name.endswith(APART) else [name, name + APART])]


def title(method: str) -> str:
    """How a method is called in tables."""
    name = precision_of(method)
    if names_recipe(name):
        return f"recipe {Path(name).stem}{method[len(name):]}"
    return {**TITLES, **EXACT}.get(method, method)


def check_methods(names: list[str]) -> None:
    """Raises ValueError for one that does not exist."""
    for name in names:
        own = precision_of(name)
        if names_recipe(own):
            Recipe.load(own)
        elif name not in TITLES:
            try:
                as_rung(own)
            except ValueError:
                raise ValueError(f"no method {name!r}; there are {', '.join(TITLES)}, precisions such as exact, int8+fp8, "
                                 "'int8+fp8 pooled 0.3' or 'int8+fp8 apart', and recipes by their files") from None
