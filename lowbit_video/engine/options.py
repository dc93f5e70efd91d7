"""What a caller chooses of an attention call, as one value that travels whole: to a plan's key, a graph's operator, a kernel.

A new option is a field here with its check, an argument of the public functions, and its use in a kernel.
"""
from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, fields, replace
from typing import Any

from lowbit_video.kernels.formats import FORMATS, LOG2_E
from lowbit_video.kernels.variants import BACKENDS

from ..arguments import flag, number, shown
from ..pooled import Pooled, as_pooled
from ..precision import Precision, as_precision

LAYOUTS = ("NHD", "HND")
MAX_SCALE = FORMATS["fp32"].max_code / LOG2_E
"""Of a scale's magnitude: a kernel multiplies it by LOG2_E in float32."""


@dataclass(frozen=True)
class AttentionOptions:
    """The choices of one call; the meaning of each is told by `lowbit_video.attention`.

    scale: None, a number, or a tensor of one element, which makes a call without a plan. only_if_faster: refuse
    (UnsupportedError) where exact attention is measured to be faster.
    Raises ValueError for a layout, backend or precision that does not exist, listing those that do, and for a scale beyond
    float32; TypeError for what is no scale, no Pooled, or neither True nor False.
    """

    precision: Precision
    tensor_layout: str = "NHD"
    is_causal: bool = False
    scale: Any = None
    return_lse: bool = False
    backend: str = "auto"
    check_finite: bool | None = None
    only_if_faster: bool = False
    pooled: Pooled | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", as_precision(self.precision))
        object.__setattr__(self, "pooled", as_pooled(self.pooled))
        for name in ("is_causal", "return_lse", "check_finite", "only_if_faster"):
            if name != "check_finite" or self.check_finite is not None:
                object.__setattr__(self, name, flag(name, getattr(self, name)))
        if self.scale is not None and not hasattr(self.scale, "data_ptr"):
            object.__setattr__(self, "scale", _scale(self.scale))
        if not isinstance(self.tensor_layout, str) or self.tensor_layout not in LAYOUTS:
            raise ValueError(f"unknown tensor_layout {shown(self.tensor_layout)}; there are: 'NHD' "
                             "[batch, tokens, heads, head_dim] and 'HND' [batch, heads, tokens, head_dim]")
        if not isinstance(self.backend, str) or self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {shown(self.backend)}; there are: {', '.join(BACKENDS)}")

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # asked for at every call
        return self._hash

    @property
    def pools(self) -> Pooled | None:
        """How keys are pooled, None where all are kept as well."""
        return None if self.pooled is None or self.pooled.all_kept else self.pooled

    def scaled(self, head_dim: int) -> AttentionOptions:
        """The same with the scale as a number: head_dim ** -0.5 where none was chosen."""
        return replace(self, scale=head_dim**-0.5 if self.scale is None else _scale(self.scale))


def _scale(value: Any) -> float:
    scale = number("scale", value)
    if abs(scale) > MAX_SCALE:
        raise ValueError(f"scale is {scale}; give one of at most {MAX_SCALE:.3g} in magnitude, "
                         "the usual one is head_dim ** -0.5")
    return scale


_known = functools.lru_cache(maxsize=512, typed=True)(AttentionOptions)


def options_of(precision: Any, tensor_layout: str, is_causal: bool, scale: Any, *rest: Any) -> AttentionOptions:
    """The options of these choices, in AttentionOptions' order; the same choices give the same object."""
    try:
        return (AttentionOptions if hasattr(scale, "data_ptr") else _known)(precision, tensor_layout, is_causal, scale, *rest)
    except TypeError:  # unhashable: AttentionOptions says what is wrong with it
        return AttentionOptions(precision, tensor_layout, is_causal, scale, *rest)


def text_of(precision, *rest) -> str:
    """The choices as text, which is all that every tracer takes for a constant; plain Python, which they all follow."""
    spec, granularity, smooth_k, smooth_q, rotate = precision, None, None, None, None
    if hasattr(precision, "spec"):  # Paddle's SOT cannot ask isinstance() of a dataclass
        spec = precision.spec
        if not precision.exact:
            granularity, smooth_k, smooth_q = precision.granularity, precision.smooth_k, precision.smooth_q
            rotate = precision.rotate
    text = f"({spec!r}, {granularity!r}, {smooth_k!r}, {smooth_q!r}, {rotate!r})"
    for choice in rest:  # one by one: SOT formats no tuple, and would break the graph here
        if hasattr(choice, "keep"):
            text = f"{text}, {choice.text}"
        else:
            text = f"{text}, {choice!r}"
    return text


@functools.lru_cache(maxsize=512)
def of_text(text: str) -> AttentionOptions:
    """The options that `text_of` wrote down."""
    (spec, granularity, smooth_k, smooth_q, rotate), *rest = ast.literal_eval(text)
    rest = [Pooled(*choice) if isinstance(choice, tuple) else choice for choice in rest]
    return options_of(Precision(spec, rotate=rotate, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q), *rest)
