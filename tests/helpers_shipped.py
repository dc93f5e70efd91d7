"""What the tests of shipped kernels share."""
from __future__ import annotations

import importlib.metadata

import pytest


def triton_is(version: str) -> None:
    """Skips the test by name under any other Triton."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != version:
        pytest.skip(f"shipped kernels are built by Triton {version}; here is {found}")
