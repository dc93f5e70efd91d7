"""`Precision`: the bit widths of one attention call, written "q[/k]+pv"."""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from lowbit_video.kernels.formats import EXACT_FORMATS, FORMATS, QK_FORMATS

from .arguments import flag, shown

PV_FORMATS = ("fp16", "fp8")
EXACT_SPECS = (*EXACT_FORMATS, "exact")
ROTATED = " rotate"
"""What stands behind the text of a precision whose Q and K are rotated."""
POOLED = " pooled"
"""What stands behind the text of a precision in a rung whose keys are pooled (rung.py)."""
_RUNG = re.compile(rf"(\S+(?:{ROTATED})?)(?:{POOLED} (\d*\.?\d+)(?: always (\d{{1,9}}))?)?")
MIXED_QK = (("int8", "int4"), ("int8", "int2"))
GRANULARITIES = ("block", "token")
PRESETS = ("safe", "fast")
"""Recipes of this package that need no calibration; what recipes are stands in hook/recipe."""


def precision_specs() -> tuple[str, ...]:
    """Every precision string there is, the exact ones first."""
    pairs = [(name, name) for name in QK_FORMATS] + list(MIXED_QK)
    return EXACT_SPECS + tuple(f"{q if q == k else f'{q}/{k}'}+{pv}" for q, k in pairs for pv in PV_FORMATS)


def names_recipe(text: str) -> bool:
    """Whether a text that may be a precision is a recipe: a file that ends in .toml, or a preset's name."""
    return text in PRESETS or text.endswith(".toml")


def no_recipe(named: str) -> str:
    """What is said where a recipe is given and one precision is meant."""
    return (f"{named} is a recipe, and one precision is wanted here; recipes go into models: lowbit_video.apply(pipe, "
            "Recipe.load(...)), and into warmup; `generate`, `plan` and every `bench` take --recipe FILE")


def split_rung(rung: Any) -> tuple[str, tuple[float, int] | None]:
    """The precision in a rung's text, and of pooled keys the share that is kept and the tokens that always are.

    Raises ValueError for a rung that does not exist.
    """
    if isinstance(rung, str) and POOLED in rung and ROTATED in rung:
        raise ValueError(f"there is no rung {shown(rung)}: keys that are rotated are not pooled; leave out one of both")
    found = _RUNG.fullmatch(rung) if isinstance(rung, str) else None
    plain = found and found[1].removesuffix(ROTATED)
    if found is None or plain not in precision_specs() or (found[2] and plain in EXACT_SPECS):
        raise ValueError(f"there is no rung {shown(rung)}; there are: {', '.join(precision_specs())}; and low-bit ones with "
                         "pooled keys, such as 'int8+fp8 pooled 0.3' or 'int8+fp8 pooled 0.3 always 226'")
    return found[1], (float(found[2]), int(found[3] or 0)) if found[2] else None


def no_pooled(text: str) -> str:
    """What is said where a rung with pooled keys is given and one precision is meant. ValueError for no such rung either."""
    precision, (keep, always) = split_rung(text)
    return (f"{text!r} says how keys are pooled, and one precision is wanted here; lowbit_video.attention takes the two apart: "
            f"{precision!r}, pooled=lowbit_video.Pooled({keep:g}, {always}) (the text itself goes into apply, warmup, recipes "
            "and `generate --precision`)")


@dataclass(frozen=True)
class Precision:
    """The number formats of one attention call, and how they are scaled and smoothed.

    spec: "q[/k]+pv" ("int8+fp16", "int8/int4+fp8", "int2+fp16", ...), or "fp16", "bf16", "fp32",
        "exact" for full precision ("exact" computes in the tensors' own dtype); "int4+fp8 rotate" is rotate=True.
    granularity: K's, "block" (one scale per 128 rows) or "token" (one per row). Q has one per row always.
        Default: "block" for int8 and fp8, "token" as soon as int4 or int2 takes part.
    smooth_k: subtract K's mean over the tokens, which softmax does not see. Default True.
    smooth_q: subtract Q's mean and add its exact product with K back. Default: Q in int4 or int2.
    rotate: before Q and K are quantised, even out their channels and rotate them by a Hadamard matrix, so that no channel's
        outliers spoil the others; scores stay what they are. Head dims 64 and 128. It pays where smoothing leaves channels of
        Q or K much larger than others. Default False.

    "+fp16" means P and V in the tensors' own 16-bit type: bfloat16 tensors keep bfloat16's range.

    Raises ValueError for a spec or granularity that does not exist, listing those that do, and for a recipe's name; TypeError
    for a smoothing or a rotation that is neither True nor False. Pooled keys are no part of it: their text is a ValueError.
    Source: SageAttention (arXiv 2410.02367) for K smoothing, SageAttention2 (arXiv 2411.10958) for Q
    smoothing; there Q's mean is per block, here per head, so its correction is one vector per head. SmoothQuant
    (2211.10438) and QuaRot (2404.00456) for the two halves of rotation.
    """

    spec: str
    granularity: str | None = None
    smooth_k: bool | None = None
    smooth_q: bool | None = None
    rotate: bool | None = None
    q: str = field(init=False)
    k: str = field(init=False)
    pv: str = field(init=False)
    exact: bool = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.spec, str) and POOLED in self.spec and not names_recipe(self.spec):
            raise ValueError(no_pooled(self.spec))
        if isinstance(self.spec, str) and self.spec.endswith(ROTATED):
            if self.rotate is not None and not self.rotate:
                raise ValueError(f"precision {self.spec!r} and rotate={self.rotate} contradict each other; give one of them")
            object.__setattr__(self, "spec", self.spec.removesuffix(ROTATED))
            object.__setattr__(self, "rotate", True)
        if isinstance(self.spec, str) and names_recipe(self.spec):
            raise ValueError(no_recipe(repr(self.spec)))
        if not isinstance(self.spec, str) or self.spec not in precision_specs():
            raise ValueError(f"unknown precision {shown(self.spec)}; there are: {', '.join(precision_specs())}, and "
                             f"those at low bit with {ROTATED!r} behind them")
        for name in ("smooth_k", "smooth_q", "rotate"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, flag(name, getattr(self, name)))
        exact = self.spec in EXACT_SPECS
        qk, _, pv = self.spec.partition("+")
        q, _, k = qk.partition("/")
        k = k or q
        if exact:
            pv = q
            if self.granularity is not None or self.smooth_k or self.smooth_q or self.rotate:
                raise ValueError(f"precision {self.spec!r} is exact: it has no granularity, no smoothing and no rotation")
        coarse = {name for name in (q, k) if name in QK_FORMATS and FORMATS[name].bits < 8}
        granularity = self.granularity
        if granularity is None:
            granularity = "token" if coarse else "block"
        if not isinstance(granularity, str) or granularity not in GRANULARITIES:
            raise ValueError(f"unknown granularity {shown(granularity)}; there are: {', '.join(GRANULARITIES)}")
        smooth_k = not exact if self.smooth_k is None else self.smooth_k
        smooth_q = q in coarse if self.smooth_q is None else self.smooth_q
        for name, value in dict(q=q, k=k, pv=pv, exact=exact, granularity=granularity,
                                smooth_k=smooth_k, smooth_q=smooth_q, rotate=bool(self.rotate)).items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return self.spec + (ROTATED if self.rotate else "")


def as_precision(precision: Precision | str) -> Precision:
    """A Precision from itself or from its string."""
    if isinstance(precision, Precision):
        return precision
    if isinstance(precision, str):
        return Precision(precision)
    if type(precision).__name__ == "Recipe":
        raise TypeError(no_recipe(str(precision)))
    raise TypeError(f"precision is a string such as 'int8+fp16' or a Precision, not {type(precision).__name__}")
