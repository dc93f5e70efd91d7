"""Who serves a launch: Triton, which compiles here and now, or a kernel that was shipped compiled.

LOWBIT_VIDEO_KERNELS, read once, says which: "auto" (the default), "shipped" (nothing else) or "compiled" (by Triton, always).
"auto" leaves everything to Triton 3.6, whose code is what was measured and what is shipped. Beside any other Triton, or none,
shipped kernels serve on sm_90, and Triton compiles the rest.
"""
from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from typing import NamedTuple

ENVIRONMENT = "LOWBIT_VIDEO_KERNELS"
CHOICES = ("auto", "shipped", "compiled")
MEASURED = "3.6."
"""Beginning of the versions of Triton whose code was measured."""
ARCH = (9, 0)
"""What kernels are shipped for."""
GROUPS = (1, 2, 4, 8)
"""Query heads to a head of keys, of calls that ask for the LSE of smoothed keys; of all others any number."""


class Choice(NamedTuple):
    """shipped: kernels that were shipped serve what they can. compiled: Triton serves (the rest). why: in words."""

    shipped: bool
    compiled: bool
    why: str


def triton_version() -> str | None:
    """The version of the Triton that is installed, or None. It is not imported where its distribution tells."""
    try:
        if sys.modules.get("triton", "") is None or importlib.util.find_spec("triton") is None:
            return None
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


@functools.cache
def chosen() -> Choice:
    """Who serves in this process. Raises ValueError for a value of LOWBIT_VIDEO_KERNELS that there is not."""
    given, version = os.environ.get(ENVIRONMENT) or CHOICES[0], triton_version()
    if given not in CHOICES:
        raise ValueError(f"{ENVIRONMENT}={given!r} is not known; set it to one of: {', '.join(CHOICES)}")
    if given == "shipped":
        return Choice(True, False, f"{ENVIRONMENT} is 'shipped'")
    if version is None:
        return Choice(given == "auto", False, "Triton is not installed (pip install triton)")
    if given == "compiled" or version.startswith(MEASURED):
        return Choice(False, True, f"Triton {version} compiles" + (f": {ENVIRONMENT} is 'compiled'" if given != "auto" else ""))
    return Choice(True, True, f"beside Triton {version} shipped kernels serve, and it compiles the rest")


def why_not_shipped(*, arch: tuple[int, int] | None, lse: bool, group: int) -> str | None:
    """Why no shipped kernel serves a call of a Hopper variant, or None. lse: it is wanted, and keys are smoothed. group: query
    heads to a head of keys."""
    if arch != ARCH:
        return f"kernels are shipped for sm_{ARCH[0]}{ARCH[1]} only"
    if lse and group not in GROUPS:
        return f"kernels are shipped for {', '.join(map(str, GROUPS))} query heads to a head of keys where the LSE is wanted"
    return None


@functools.cache
def warn_of_speed() -> None:
    """Says once that Triton compiles what was measured under another version of it."""
    version = triton_version()
    if version is not None and not version.startswith(MEASURED):
        warnings.warn(f"Triton {version} compiles kernels here; their speed was measured under {MEASURED}x and may differ "
                      "(`lowbit-video doctor` says what was shipped compiled)", stacklevel=4)
