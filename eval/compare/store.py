"""The result file: JSON lines, appended one finished run at a time, safe against a kill at any moment."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lowbit_video.arguments import shown

RESULTS = "results.jsonl"
HOLDS = {"run": {"runs": list, "settings": dict}, "video": {"prompt": str, "seed": int, "run": str}}
"""What each kind of line has at least, and of which type."""


class Store:
    """A folder of results.

    results.jsonl has one "run" line for each start (settings, machine) and one "video" line for each finished video. A line
    is written whole and flushed to disk before the next video starts; a torn last line (the machine died inside the
    write) is cut off when the folder is opened again, and that video is made anew.
    """

    def __init__(self, folder, *, write: bool = True) -> None:
        """Open a folder of results.

        Raises:
            FileNotFoundError: to read, and there are no results. ValueError: a line that is not ours, or another process
            is writing here. PermissionError: the folder cannot be written.
        """
        self.folder = Path(folder)
        self.path = self.folder / RESULTS
        self._file = None
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")
            self._lock()
        elif not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no results here; make some with `lowbit-video eval compare --out {folder}`")
        self.lines = self._read(repair=write)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not POSIX: no lock, and nothing worse than interleaved lines if two write
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{self.path}: another evaluation writes here; wait for it, or give another --out") from error

    def _read(self, repair: bool) -> list[dict]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if repair and whole < len(data):
            os.truncate(self.path, whole)
        lines = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                lines.append(_checked(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}:{number}: not a line of results ({error}); remove the line, its video is made "
                                 "anew") from error
        return lines

    def append(self, line: dict) -> None:
        """Add one line and wait until it is on disk."""
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(line)

    def close(self) -> None:
        """Let go of the file and its lock."""
        if self._file:
            self._file.close()

    def runs(self) -> list[dict]:
        """The lines that say how the videos were made, oldest first."""
        return [line for line in self.lines if line["kind"] == "run"]

    def videos(self) -> list[dict]:
        """One line per finished video, the latest where one was made twice."""
        latest = {(line["prompt"], line["seed"], line["run"]): line for line in self.lines if line["kind"] == "video"}
        return list(latest.values())

    def has(self, prompt: str, seed: int, run: str) -> bool:
        """Whether this video is finished."""
        return any(v["prompt"] == prompt and v["seed"] == seed and v["run"] == run for v in self.lines if v["kind"] == "video")


def _checked(line: Any) -> dict:
    """A line as it was read; ValueError for one that lacks what every line of its kind has."""
    kind = line.get("kind") if isinstance(line, dict) else None
    if not isinstance(kind, str) or kind not in HOLDS:
        raise ValueError(f"it is neither of {', '.join(HOLDS)}")
    for name, type_ in HOLDS[kind].items():
        if not isinstance(line.get(name), type_):
            raise ValueError(f"{name} is {shown(line.get(name))}, not a {type_.__name__}")
    if kind == "run" and not isinstance(line["settings"].get("model"), str):
        raise ValueError("its settings name no model")
    return line
