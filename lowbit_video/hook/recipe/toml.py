"""A recipe as TOML: what a person reads and changes."""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...arguments import shown
from ...files import write_whole
from ...precision import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: str | os.PathLike) -> dict[str, Any]:
    """What a file holds. ValueError, naming it, for no such file (and what recipes there are) and for what is no TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no such file: {path}; give a recipe's .toml file, such as `lowbit-video calibrate` writes, or a "
                         f"preset's name: {', '.join(PRESETS)}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give a recipe's file") from None
    except (ValueError, RecursionError) as reason:  # neither TOML nor UTF-8, or nested without end
        raise ValueError(f"{path} is not valid TOML: {reason}") from None


def write_toml(path: str | os.PathLike, tables: Mapping[str, Any]) -> None:
    """Writes plain values, tables of them and lists of tables, in their order; whole or not at all."""
    plain = {key: value for key, value in tables.items() if not _is_table(value) and not _is_tables(value)}
    parts = [_lines(plain)] if plain else []
    for key, value in tables.items():
        if _is_table(value) and value:
            parts.append(f"[{key}]\n{_lines(value)}")
        elif _is_tables(value):
            parts += [f"[[{key}]]\n{_lines(table)}" for table in value]
    with write_whole(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_table, value))


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{key if key.replace('_', '').isalnum() and key.isascii() else _text(key)} = {_value(value)}\n"
                   for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(float(value) if isinstance(value, float) else int(value))  # NumPy's say their type
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"a recipe's file holds texts, numbers, yes and no, and lists of them, not {shown(value)}")


def _text(text: str) -> str:
    """As JSON writes it, which TOML reads; but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
