"""Which kernel serves a call: the first row of the table that has no reason against it."""
from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

from lowbit_video.kernels.formats import EXACT_FORMATS
from lowbit_video.kernels.variants import VARIANTS, KernelVariant, Request, spec_of

from ..errors import SlowerThanExactWarning, UnsupportedError

LEFT_OUT = {"pooled": "pooled", "causal": "is_causal", "rotate": "the rotation"}
"""What a request can be without, by its name there, and how that is said."""
EXACT_INSTEAD = "give the processor fallback='exact'"


def select(request: Request, backend: str = "auto", variants: Sequence[KernelVariant] = VARIANTS) -> KernelVariant:
    """The first variant of the backend that serves the request.

    Raises UnsupportedError with the reason of every variant that was considered, and what would be served in its place.
    """
    reasons = []
    for variant in variants:
        if backend not in ("auto", variant.backend):
            continue
        reason = why_not(variant, request, backend)
        if reason is None:
            return variant
        reasons.append((variant, reason))
    listing = "\n".join(f"  {variant.name}: {reason}" for variant, reason in reasons)
    # who asks for what is faster alone has exact attention to fall back to, and may ask at every call
    instead = [] if request.only_if_faster else served_instead(request, backend, variants)
    raise UnsupportedError(f"no kernel of backend {backend!r} serves {request}:\n{listing}\n"
                           f"{', or '.join([*instead, EXACT_INSTEAD])}; `lowbit-video kernels` lists what exists")


def why_not(variant: KernelVariant, request: Request, backend: str) -> str | None:
    """Why a variant of the backend is not taken for a request, or None if it can be."""
    # Under Triton's interpreter the CPU still means NumPy, unless Triton is asked for by name.
    away = backend == "auto" and request.device == "cpu" and variant.device != "cpu"
    reason = "it needs an NVIDIA GPU" if away else variant.why_not(request)
    return by_name_only(variant) if reason is None and backend == "auto" and not variant.automatic else reason


def served_instead(request: Request, backend: str, variants: Sequence[KernelVariant]) -> list[str]:
    """What to change, in words, where none serves a request: each is enough by itself. Empty where only several are."""
    def serves(backend: str = backend, **changed: Any) -> bool:
        other = dataclasses.replace(request, **changed)
        return any(backend in ("auto", variant.backend) and why_not(variant, other, backend) is None for variant in variants)

    found = [f"leave out {said}" for name, said in LEFT_OUT.items() if getattr(request, name) and serves(**{name: False})]
    given = request.head_dim
    wider = sorted({max(32, -(-given // 8) * 8), *(dim for variant in variants for dim in variant.head_dims)})
    if dim := next((dim for dim in wider if dim > given and serves(head_dim=dim)), None):
        found.append(f"pad q, k and v with zeros to head_dim {dim}, give scale={given}**-0.5 unless you have one, and take the "
                     f"output's first {given} channels")
    low = dict.fromkeys(formats for variant in variants for formats in variant.formats if formats[0] not in EXACT_FORMATS)
    if formats := next(((q, k, pv) for q, k, pv in low if serves(q=q, k=k, pv=pv)), None):
        found.append(f"give another precision, such as {spec_of(*formats)!r}")
    backends = dict.fromkeys(("auto", *(variant.backend for variant in variants)))
    if name := next((name for name in backends if name != backend and serves(name)), None):
        found.append(f"give another backend, such as {name!r}")
    return found


def by_name_only(variant: KernelVariant) -> str:
    """Why "auto" leaves out a variant that serves."""
    return f"it is taken where it is asked for by name only: backend={variant.backend!r}"


def warn_if_slower(variant: KernelVariant, request: Request) -> None:
    """Says (SlowerThanExactWarning) that exact attention is measured to be faster at this length than what was asked for."""
    if request.arch is not None:
        reason = variant.why_not(dataclasses.replace(request, only_if_faster=True))
        if reason is not None:
            warnings.warn(f"{variant.name}: {reason}; precision='exact', or fallback='exact' in the processor, takes it",
                          SlowerThanExactWarning, stacklevel=4)
