"""Shared by the tests of shipped kernels."""
from __future__ import annotations

import pytest

from lowbit_video.kernels.shipped.choice import triton_version
from lowbit_video.kernels.shipped.store import manifest


@pytest.fixture
def builder():
    """Skips the test by name where Triton is not the one that shipped kernels are built by."""
    wanted, here = manifest()["compiler"], f"triton {triton_version()}"
    if here != wanted:
        pytest.skip(f"shipped kernels are built by {wanted}; here is {here}")
