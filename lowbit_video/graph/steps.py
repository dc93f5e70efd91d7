"""Norms and positions as a graph's operator takes them: their tensors, where positions begin, and the rest as text."""
from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from lowbit_video.kernels.prologue.steps import Norm, Rotary, Steps


def without_tensors(steps: Steps) -> tuple[str, list[Any], Any]:
    """(the rest as text, the tensors, where positions begin, 0 without any), of which `with_tensors` makes the steps again.

    Written out, so that compilers can trace it. Only what makes a graph another one is in the text.
    """
    tensors, rest = [], []
    for norm in (steps.q_norm, steps.k_norm):
        if norm is None:
            rest.append(None)
            continue
        rest.append((norm.kind, norm.eps, norm.weight is not None, norm.bias is not None, norm.rounds_first))
        if norm.weight is not None:
            tensors.append(norm.weight)
        if norm.bias is not None:
            tensors.append(norm.bias)
    if steps.rotary is None:
        return repr(rest), tensors, 0
    return repr(rest), tensors + [steps.rotary.cos, steps.rotary.sin], steps.rotary.begin


def with_tensors(text: str, tensors: Sequence[Any], begin: int) -> Steps:
    """The steps that `without_tensors` took apart."""
    left = list(tensors)
    norms = []
    for rest in ast.literal_eval(text):
        if rest is not None:
            kind, eps, weight, bias, rounds_first = rest
            rest = Norm(kind, eps, left.pop(0) if weight else None, left.pop(0) if bias else None, rounds_first)
        norms.append(rest)
    return Steps(*norms, Rotary(*left, begin, int(left[0].shape[0])) if left else None)
