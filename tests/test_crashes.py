"""A test that a process died in runs once more where its file is known for that, and nowhere else."""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import crashes

ITEM = "tests/lowbit_video/graph/test_to_static.py::test_a[x]"


@pytest.mark.parametrize("status, outcome, told", [
    (0, "passed", "passed by itself (Paddle"), (1, "failed", "failed by itself, too"),
    (-11, "failed", "failed by itself, too")])
def test_a_known_crash_is_what_the_test_by_itself_is(status, outcome, told, monkeypatch):
    asked = []
    monkeypatch.setattr(crashes.subprocess, "run", lambda command, **how: asked.append(command) or SimpleNamespace(
        returncode=status, stdout="why it failed"))
    report = SimpleNamespace(outcome="failed", longrepr="worker 'gw0' crashed")
    assert told in crashes.once_more(ITEM, report)
    assert report.outcome == outcome and asked[0][-1] == ITEM and "no:xdist" in asked[0]
    assert report.longrepr is None if status == 0 else "why it failed" in report.longrepr


def test_any_other_crash_is_a_failure(monkeypatch):
    monkeypatch.setattr(crashes.subprocess, "run", lambda *given, **how: pytest.fail("it must not run again"))
    report = SimpleNamespace(outcome="failed", longrepr="worker 'gw0' crashed")
    assert crashes.once_more("tests/kernels/test_aot.py::test_a", report) is None and report.outcome == "failed"
    assert report.longrepr == "worker 'gw0' crashed"


@pytest.mark.parametrize("known, status", [("test_dies.py", 0), ("another.py", 1)])
def test_a_run_that_loses_a_process(known, status, tmp_path):
    """A process dies in a test once; by itself it passes."""
    pytest.importorskip("xdist", reason="paddle's tests share processes by pytest-xdist, which `make test` installs")
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport pytest, crashes\n"
        f"crashes.KNOWN = {{{known!r}: 'it dies once'}}\n@pytest.hookimpl(optionalhook=True)\n"
        "def pytest_handlecrashitem(crashitem, report, sched):\n    print(crashes.once_more(crashitem, report))\n")
    (tmp_path / "test_dies.py").write_text(
        "import os, pathlib\n\ndef test_dies():\n    seen = pathlib.Path(__file__).with_name('seen')\n"
        "    if not seen.exists():\n        seen.touch()\n        os._exit(3)\n\ndef test_lives():\n    pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "1", "--dist", "loadfile", "test_dies.py"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("passed by itself (it dies once)" in done.stdout) == (status == 0)
