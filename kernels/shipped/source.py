"""What a kernel is made of: its text and that of every function and constant of this package that it reads, as one hash.

Comments, docstrings, blank lines and indentation are left out. A launcher is not part of it: what that chooses is in a launch.
"""
from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPAQUE = ("language", "stand_in", "attention/gluon_shim")
"""Files that only name what is Triton's."""


class _Module:
    """A source file: what its top level defines, and what it imports from this package."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.lines, self.defined, self.imported = text.splitlines(), {}, {}
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.defined[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.defined.update({one.id: node for one in ast.walk(target) if isinstance(one, ast.Name)})
            elif isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1]
                for alias in node.names:
                    place = folder.joinpath(*(node.module or "").split("."))
                    inside = None if (place / f"{alias.name}.py").exists() else alias.name
                    self.imported[alias.asname or alias.name] = (place / alias.name if inside is None else place, inside)

    def text(self, name: str) -> str:
        """The definition of a name, without what says nothing to a compiler."""
        node = self.defined[name]
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
        lines = self.lines[first - 1:node.end_lineno]
        for one in ast.walk(node):
            if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(one) is not None:
                for number in range(one.body[0].lineno, one.body[0].end_lineno + 1):
                    lines[number - first] = ""
        for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
        return "\n".join(line.strip() for line in lines if line.strip())


@functools.cache
def _module(place: Path) -> _Module:
    return _Module(place.with_name(place.name + ".py"))


def _reads(place: Path, name: str) -> Iterator[tuple[Path, str]]:
    """The names of this package that a definition reads, each with its file."""
    module = _module(place)
    for node in ast.walk(module.defined[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            there, inside = module.imported.get(node.value.id, (None, ""))
            if inside is None:
                yield there, node.attr
        elif isinstance(node, ast.Name):
            if node.id in module.defined:
                yield place, node.id
            elif node.id in module.imported and module.imported[node.id][1] is not None:
                yield module.imported[node.id]


def closure(kernel: str) -> dict[str, str]:
    """The text of each definition that a kernel (as `kinds.name_of` names it) is made of, by file and name."""
    module, _, name = kernel.partition(":")
    todo, found = [(ROOT.joinpath(*module.split(".")), name)], {}
    while todo:
        place, name = todo.pop()
        key = f"{place.relative_to(ROOT).as_posix()}:{name}"
        if key in found or place.relative_to(ROOT).as_posix() in OPAQUE or name not in _module(place).defined:
            continue
        found[key] = _module(place).text(name)
        todo += _reads(place, name)
    return dict(sorted(found.items()))


def digest(kernel: str) -> str:
    """The SHA-256 of a kernel's `closure`."""
    return hashlib.sha256("\n\n".join(f"{key}\n{text}" for key, text in closure(kernel).items()).encode()).hexdigest()
