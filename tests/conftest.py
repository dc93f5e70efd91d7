"""Shared by all tests: frameworks as parameters, seeded inputs."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from crashes import once_more

from quick_start import sitecustomize  # noqa: F401
from skips import skip_lines

os.environ.setdefault("OMP_NUM_THREADS", "2")
QUICK_START = Path(sitecustomize.__file__).parent
"""What processes that tests start begin with, too."""
if str(QUICK_START) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(QUICK_START), os.environ.get("PYTHONPATH"))))


def pytest_terminal_summary(terminalreporter):
    """Says at the end how many tests were skipped for what, and which command runs them."""
    lines = [line for part in skip_lines(terminalreporter.stats.get("skipped", [])) for line in part]
    if lines:
        terminalreporter.section("what was skipped")
        terminalreporter.write_line("\n".join(lines))
    if CRASHES:
        terminalreporter.section("what a process died in")
        terminalreporter.write_line("\n".join(CRASHES))


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    """Of pytest-xdist: where a process died in a test that may do that, by no fault of this tree, it runs once more."""
    if (told := once_more(crashitem, report)) is not None:
        CRASHES.append(told)


CRASHES = []


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """A run in which something was skipped for a reason that is not on the list has failed."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and skip_lines(terminal.stats.get("skipped", []))[1]:
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


LONGEST = (
    "kernels/test_aot.py", "graph/test_to_static.py", "distributed/test_launched.py", "graph/test_torch_compile_model.py",
    "dispatcher/test_parallel.py", "world/test_judge.py", "examples/test_cogvideo.py", "world/test_scene_judge.py",
    "kernels/test_hopper.py", "examples/test_small_model.py", "dispatcher/test_compile.py", "hook/test_own_frame.py",
    "hook/test_beside_accelerate.py", "cogvideox/test_vae_ranks.py", "distributed/test_small_model.py",
    "distributed/test_ring.py", "kernels/test_portable_interpreted.py", "distributed/test_ulysses.py",
    "speed/test_step_paddle.py", "cogvideox/test_pipeline.py", "distributed/test_parallelize.py", "report/test_report.py",
    "kernels/pooled/test_pooled_aot.py", "kernels/shipped/test_launch.py", "cogvideox/test_low_memory.py",
    "kernels/test_hopper_simulated.py", "kernels/test_rotation_kernels.py", "kernels/test_exchange.py",
    "compare/test_compare.py", "cogvideox/test_transformer.py", "calibrate/test_calibrate.py", "runtime/test_runtime.py",
    "shared/test_weights.py", "shared/test_video_files.py", "compare/test_layers.py", "kernels/test_compiled.py",
)
"""Files that take long come first, where nothing compiled is kept too, so that processes that share the tests end together."""


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.as_posix()
        return next((number for number, end in enumerate(LONGEST) if path.endswith(end)), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(params=["paddle", pytest.param("torch", marks=pytest.mark.torch)])
def framework(request):
    """A small adapter, so that one test body serves Paddle and torch tensors on the CPU."""
    if request.param == "paddle":
        paddle = pytest.importorskip("paddle", reason="paddle is not installed")
        return Framework("paddle", lambda a, dtype: paddle.to_tensor(np.ascontiguousarray(a), place="cpu").astype(dtype),
                         lambda t: t.astype("float32").numpy())
    torch = pytest.importorskip("torch", reason="torch is not installed")
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
