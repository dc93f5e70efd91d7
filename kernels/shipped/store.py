"""The kernels that were shipped: what the manifest says of each, which one does for a launch, and its code."""
from __future__ import annotations

import functools
import hashlib
import json
import threading
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from ..parameters import TensorMap
from .kinds import Described, does_for

MANIFEST = Path(__file__).with_name("manifest.json")
IMAGES = Path(__file__).with_name("images.zip")
_READING = threading.Lock()


class Build(NamedTuple):
    """One compiled kernel.

    kernel, constants, kinds: of `kinds.Described`. function: its name in the code. image: the code's, in the archive. warps,
    shared: of a launch; bytes. maps: one for each descriptor. registers, stack: of a thread; bytes.
    """

    kernel: str
    constants: tuple[str, ...]
    kinds: tuple[str, ...]
    function: str
    image: str
    warps: int
    shared: int
    maps: tuple[TensorMap, ...]
    registers: int
    stack: int


def image_name(image: bytes) -> str:
    """What the archive calls a kernel's code."""
    return f"{hashlib.sha256(image).hexdigest()[:20]}.cubin"


@functools.cache
def manifest() -> dict[str, Any]:
    """The manifest as it is written."""
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


@functools.cache
def builds() -> tuple[Build, ...]:
    """All that was shipped."""
    return tuple(Build(**{**entry, "constants": tuple(entry["constants"]), "kinds": tuple(entry["kinds"]),
                          "maps": tuple(TensorMap(*one) for one in entry["maps"])}) for entry in manifest()["builds"])


@functools.cache
def _by_constants() -> dict[tuple, list[Build]]:
    found: dict[tuple, list[Build]] = {}
    for build in builds():
        found.setdefault((build.kernel, build.constants), []).append(build)
    return found


@functools.lru_cache(maxsize=4096)
def _find(name: str, constants: tuple[str, ...], kinds: tuple[str, ...]) -> Build | None:
    candidates = _by_constants().get((name, constants), ())
    fits = [one for one in candidates if len(one.kinds) == len(kinds) and all(map(does_for, one.kinds, kinds))]
    # of those that do the one that was compiled for the most of what is given
    return max(fits, key=lambda one: sum(map(str.__eq__, one.kinds, kinds)), default=None)


def find(described: Described) -> Build | None:
    """The build that does for a launch, or None."""
    return _find(*described.key)


def image(build: Build) -> bytes:
    """A build's code, a cubin. Raises RuntimeError for an archive that is not the manifest's."""
    with _READING, zipfile.ZipFile(IMAGES) as archive:
        data = archive.read(build.image)
    if image_name(data) != build.image:
        raise RuntimeError(f"{IMAGES.name} holds other code for {build.function} than {MANIFEST.name} says; install again")
    return data
