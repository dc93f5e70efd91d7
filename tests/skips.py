"""What was skipped, in a line for each kind with the command that runs it. The kinds are all there are: another one fails.

Whatever a CPU can run, `make test` runs: what is skipped there needs something that this machine lacks, and says what.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

KINDS = (
    ("of those for NVIDIA GPUs", "`make gpu-test` with one, under each framework,", ("gpu",), ("NVIDIA GPU",)),
    ("without ppdiffusers", "`make interop`", ("interop",), ("ppdiffusers",)),
    ("without PyTorch, diffusers or transformers", "`make parity`", ("torch", "parity"),
     ("torch", "diffusers", "transformers", "accelerate", "peft")),
    ("without a browser", "`apt-get install chromium chromium-driver`, then `make test`", (), ("Chromium", "selenium")),
    ("beside an NVIDIA GPU", "`make test` on a machine without one", (), ("this machine has a GPU", "has GPUs of its own")),
    ("without the Triton that kernels are shipped by", "`make test` on Linux", (), ("Triton", "shipped kernels")),
    ("without a C compiler", "`apt-get install gcc`, then `make test`", (), ("C compiler",)),
    ("without NumPy's own OpenBLAS on several cores", "`make test` there with PyPI's NumPy", (), ("OpenBLAS",)),
    ("without packages that `make test` installs", "`make test`", (), ("paddle", "matplotlib", "scikit-image", "scipy")),
    ("outside of a checkout", "`make test` in one", (), ("not in this tree", "is not here", "README.md has no")),
)
"""(what is missing, what runs them, marks of such tests, words of such reasons); the first that fits."""


def kind_of(reason: str, marks: Iterable[str] = ()) -> tuple[str, str] | None:
    """(what is missing, what runs them) of a skipped test; None for a reason that is not on the list."""
    for missing, command, known, words in KINDS:
        if any(mark in marks for mark in known) or any(word.lower() in reason.lower() for word in words):
            return missing, command
    return None


def skip_lines(reports: Iterable[Any]) -> tuple[list[str], list[str]]:
    """(a line for each kind among pytest's reports of skipped tests, a line for each reason that is not on the list).

    A file that is left out whole is one report.
    """
    known, unknown = Counter(), Counter()
    for report in reports:
        reason = report.longrepr[2].removeprefix("Skipped: ")
        what = "files" if getattr(report, "when", "collect") == "collect" else "tests"
        kind = kind_of(reason, getattr(report, "keywords", ()))
        if kind is None:
            unknown[f"{what} skipped for a reason that tests/skips.py does not know: {reason}"] += 1
        else:
            known[f"{what} skipped {kind[0]}; {kind[1]} runs them"] += 1
    return tuple([f"{count} {text}" for text, count in counts.most_common()] for counts in (known, unknown))
