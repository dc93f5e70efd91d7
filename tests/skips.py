"""What was skipped, in a line for each kind with the command that runs it."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

KINDS = (
    ("without an NVIDIA GPU", "`make gpu-test` on a machine with one", ("gpu",), ("NVIDIA GPU",)),
    ("without PyTorch, diffusers or transformers", "`make parity`", ("torch", "parity"),
     ("torch", "diffusers", "transformers", "accelerate")),
    ("without a browser", "`apt-get install chromium chromium-driver`, then `make test`", (), ("Chromium",)),
)
"""(what is missing, what runs them, marks of such tests, words of such reasons); the first that fits."""


def skip_lines(reports: Iterable[Any]) -> list[str]:
    """A line for each kind among pytest's reports of skipped tests, and for each reason of no kind.

    A file that is left out whole is one report.
    """
    counts: Counter = Counter()
    for report in reports:
        reason, marks = report.longrepr[2].removeprefix("Skipped: "), getattr(report, "keywords", ())
        told = f"otherwise: {reason}"
        for missing, command, known, words in reversed(KINDS):
            if any(mark in marks for mark in known) or any(word.lower() in reason.lower() for word in words):
                told = f"{missing}; {command} runs them"
        counts[told, "files" if getattr(report, "when", "collect") == "collect" else "tests"] += 1
    return [f"{count} {what} skipped {told}" for (told, what), count in counts.most_common()]
