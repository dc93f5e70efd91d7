"""Files written whole or not at all, and JSON read with errors that name the file."""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending, to write to; it takes the place of `path` when the block ends.

    After an error or Ctrl-C in the block nothing is left of it, and `path` is as it was.

        with write_whole(folder / "a.npy") as temporary:
            np.save(temporary, array)
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | os.PathLike, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        error: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # a byte-order mark is no JSON
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"no such file: {path}") from None
    except (ValueError, RecursionError) as reason:  # not JSON, not UTF-8, a number of thousands of digits, nested without end
        raise error(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: str | os.PathLike, value: Mapping[str, Any], indent: int = 1, **layout: Any) -> None:
    """Writes a JSON object, whole or not at all. layout: as `json.dumps` takes it."""
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, **layout) + "\n", encoding="utf-8")
