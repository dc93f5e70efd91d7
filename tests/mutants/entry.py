"""One planted fault: a small wrong change, and the test that must notice it."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """`old` is found exactly once in `file` and becomes `new`; then `test` (a pytest id) must fail.

    equivalent: why no test can fail, where the change changes nothing; such a mutant is not planted.
    """

    file: str
    old: str
    new: str
    test: str
    equivalent: str = ""

    def __str__(self) -> str:
        short = lambda text: text if len(text) < 60 else f"{text[:28]} .. {text[-28:]}"
        return f"{self.file}: {short(self.old)!r} -> {short(self.new)!r}"

    def planted(self, source: str) -> str:
        """The file's text with the fault; ValueError unless the old text is there exactly once and the new one differs."""
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self}: the old text is found {count} times in the file, it must be once")
        if self.old == self.new:
            raise ValueError(f"{self}: nothing is changed")
        return source.replace(self.old, self.new)


def faults(file: str, test: str, *planted: tuple[str, str] | tuple[str, str, str]) -> list[Mutant]:
    """Mutants of one file that one test notices: (old, new), or (old, new, why it is equivalent)."""
    return [Mutant(file, old, new, test, *why) for old, new, *why in planted]
