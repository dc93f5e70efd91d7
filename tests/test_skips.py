"""Skipped tests are told by what is missing and by the command that runs them."""
from types import SimpleNamespace

from skips import skip_lines


def report(reason, *marks, when="setup"):
    return SimpleNamespace(longrepr=("file.py", 3, f"Skipped: {reason}"), keywords=dict.fromkeys(marks), when=when)


def test_a_line_for_each_kind_and_for_each_other_reason():
    given = [report("needs an NVIDIA GPU (torch finds none)", "gpu")] * 3 + [report("an edge of another type", "gpu")]
    given += [report("torch is not installed", "torch")] * 2 + [report("PyTorch is not installed", when="collect")]
    given += [report("Chromium and chromedriver are not installed", when="collect"), report("the moon is full")]
    assert skip_lines(given) == [
        "4 tests skipped without an NVIDIA GPU; `make gpu-test` on a machine with one runs them",
        "2 tests skipped without PyTorch, diffusers or transformers; `make parity` runs them",
        "1 files skipped without PyTorch, diffusers or transformers; `make parity` runs them",
        "1 files skipped without a browser; `apt-get install chromium chromium-driver`, then `make test` runs them",
        "1 tests skipped otherwise: the moon is full"]
    assert skip_lines([]) == []
