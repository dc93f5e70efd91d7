"""The experiment that times calls from plans says where a plan gives other bits, launches through Triton, or fails."""
import os

import numpy as np
import pytest

pytest.importorskip("triton", reason="counts what Triton launches")

from triton.runtime.jit import JITFunction  # noqa: E402

from lowbit_video.eval.speed.experiments import host_time  # noqa: E402
from lowbit_video.kernels.exchange.merge import merge_kernel  # noqa: E402


class World(host_time.World):
    """Cases without a GPU: a call doubles what it is given, and does as `faults` says where it is made from a plan."""

    def __init__(self, **faults):
        self.faults = faults

    def bits(self, results):
        return [results]

    def cases(self):
        for name, fault in self.faults.items():
            def call(x, fault=fault):
                return fault(x) if host_time.OFF not in os.environ else 2 * x

            yield name, call, (np.ones(3), np.arange(3.0))


@pytest.fixture
def launches(monkeypatch):
    """Launches of Triton do nothing."""
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **more: None)


def test_what_a_plan_does_wrong_is_told(launches):
    def through_triton(x):
        merge_kernel[(1,)]()
        return 2 * x

    def fails(x):
        raise ValueError("no such kernel")

    count, wrong = host_time.compare(World(
        right=lambda x: 2 * x, stale=lambda x: 2 * np.ones(3), rounded=lambda x: 2 * x + 1e-7 * (x == 2),
        first=lambda x: 2 * x - (x[0] == 1), triton=through_triton, fails=fails))
    assert count == 6
    assert wrong == ["stale: other bits, or no number", "rounded: other bits, or no number", "first: other bits, or no number",
                     "triton: Triton launched merge_kernel; {}", "fails: ValueError: no such kernel"]


def test_the_environment_is_as_it_was(monkeypatch):
    for before in ("0", "1", None):
        monkeypatch.delenv(host_time.OFF, raising=False)
        if before is not None:
            monkeypatch.setenv(host_time.OFF, before)
        for plans in (True, False):
            with host_time.launching(plans):
                assert os.environ.get(host_time.OFF) == (None if plans else "0")
            assert os.environ.get(host_time.OFF) == before
