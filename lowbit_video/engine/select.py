"""Which kernel serves a call: the first row of the table that has no reason against it."""
from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

from lowbit_video.kernels.variants import VARIANTS, KernelVariant, Request

from ..errors import SlowerThanExactWarning, UnsupportedError


def select(request: Request, backend: str = "auto", variants: Sequence[KernelVariant] = VARIANTS) -> KernelVariant:
    """The first variant of the backend that serves the request.

    Raises UnsupportedError with the reason of every variant that was considered.
    """
    reasons = []
    for variant in variants:
        if backend not in ("auto", variant.backend):
            continue
        # Under Triton's interpreter the CPU still means NumPy, unless Triton is asked for by name.
        away = backend == "auto" and request.device == "cpu" and variant.device != "cpu"
        reason = "it needs an NVIDIA GPU" if away else variant.why_not(request)
        if reason is None and backend == "auto" and not variant.automatic:
            reason = by_name_only(variant)
        if reason is None:
            return variant
        reasons.append((variant, reason))
    listing = "\n".join(f"  {variant.name}: {reason}" for variant, reason in reasons)
    raise UnsupportedError(f"no kernel of backend {backend!r} serves {request}:\n{listing}\n"
                           "try another precision or backend, or fallback='exact' in the processor; "
                           "`lowbit-video kernels` lists what exists")


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
