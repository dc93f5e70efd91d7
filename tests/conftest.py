"""Shared by all tests: frameworks as parameters, seeded inputs."""
from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from skips import skip_lines

os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_terminal_summary(terminalreporter):
    """Says at the end how many tests were skipped for what, and which command runs them."""
    lines = skip_lines(terminalreporter.stats.get("skipped", []))
    if lines:
        terminalreporter.section("what was skipped")
        terminalreporter.write_line("\n".join(lines))


def _missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@pytest.fixture(params=["paddle", pytest.param("torch", marks=pytest.mark.torch)])
def framework(request):
    """A small adapter, so that one test body serves Paddle and torch tensors on the CPU."""
    if _missing(request.param):
        pytest.skip(f"{request.param} is not installed")
    if request.param == "paddle":
        import paddle

        return Framework("paddle", lambda a, dtype: paddle.to_tensor(np.ascontiguousarray(a), place="cpu").astype(dtype),
                         lambda t: t.astype("float32").numpy())
    import torch

    return Framework("torch", lambda a, dtype: torch.from_numpy(np.ascontiguousarray(a)).to(getattr(torch, dtype)),
                     lambda t: t.float().numpy())


class Framework:
    """name; tensor(array, dtype="float32"); numpy(tensor) as float32."""

    def __init__(self, name, make, read):
        self.name, self._make, self._read = name, make, read

    def tensor(self, array, dtype="float32"):
        return self._make(np.asarray(array, np.float32), dtype)

    def numpy(self, tensor):
        return self._read(tensor)
