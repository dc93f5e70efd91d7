"""Files and folders written whole or not at all, and JSON read with errors that name the file."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
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


@contextlib.contextmanager
def write_folder_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder inside `folder`, to write to; what it holds takes its place in `folder` when the block ends.

    A file or folder of the same name is replaced as a whole, what else `folder` has stays. After an error or Ctrl-C nothing is
    left of the temporary one, and `folder` is as it was: not there, if it was not.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder")
    there = folder.exists()
    temporary = folder / f".tmp{os.getpid()}"
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir(parents=True)
        old.mkdir()
        yield new
        moved = []
        try:
            for name in sorted(os.listdir(new)):
                moved.append(name)
                for source, target in ((folder, old), (new, folder)):
                    if os.path.lexists(source / name):
                        os.replace(source / name, target / name)
        except BaseException:
            for name in moved:
                for source, target in ((folder, new), (old, folder)):
                    if os.path.lexists(source / name) and not os.path.lexists(target / name):
                        os.replace(source / name, target / name)
            raise
        there = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()


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
