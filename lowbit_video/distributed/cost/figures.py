"""The figures that the model of cost is made from: `measured.json` beside this file, where each stands with its source."""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...files import read_json
from ...precision import names_recipe
from .models import MODELS

MEASURED = Path(__file__).with_name("measured.json")
"""The figures that come with the package."""
DECODED = [1, 16, 13, 60, 90]
"""Latents of the 2b model's own video."""
USUAL = {"exchange": "auto", "output": "16bit"}
"""What travels where a measured row does not say it."""


@dataclass(frozen=True)
class Gpu:
    """One GPU. sms: that share out tiles. memory_gib: of it. host_ranks: GPUs of one host."""

    name: str
    sms: int
    memory_gib: float
    host_ranks: int


@dataclass(frozen=True)
class Tile:
    """Attention of one tile of query rows, int8+fp8: tile_us + block_us a block of 128 keys; a call costs call_us more."""

    rows: int
    tile_us: float
    block_us: float
    call_us: float


@dataclass(frozen=True)
class Link:
    """A wire of one GPU, in one direction: what an exchange costs whatever its size, and GB (1e9 bytes) a second.

    all_to_all: everyone with everyone. neighbour: in a ring. small_us: an exchange of some kilobytes.
    """

    all_to_all_us: float
    all_to_all_gb_s: float
    neighbour_us: float
    neighbour_gb_s: float
    small_us: float


@dataclass(frozen=True)
class Program:
    """Everything but attention in one framework.

    matrix_tflops: of products whose tiles fill the GPU. elementwise_ps: norms, elementwise work and concatenation, a layer, a
    channel of a token. prologue_ps: likewise norms and positions of Q and K where they are not computed with quantisation:
    tokens that are shared, and exact attention. step_ms: what is not shared. layer_host_us: the host's part of a layer, below
    which no layer goes. models: other values of these by a model's name.
    """

    matrix_tflops: float
    elementwise_ps: float
    prologue_ps: float
    step_ms: float
    layer_host_us: float
    models: Mapping[str, Mapping[str, float]]

    def of(self, model: str) -> Program:
        """With the values that this model has of its own."""
        return replace(self, **self.models.get(model, {}))


@dataclass(frozen=True)
class Around:
    """What surrounds attention's kernel; quantise_ps and merge_ps a value, hidden_share of a transfer beside attention."""

    quantise_ps: float
    merge_ps: float
    copy_gb_s: float
    hidden_share: float


@dataclass(frozen=True)
class VideoFigures:
    """What surrounds the steps, and memory. decode_*, cache_bytes: a pixel of a frame, or of the picture."""

    scheduler_ms: float
    text_ms: float
    decode_ns: float
    decode_layers: int
    decode_bytes: float
    cache_bytes: float
    runtime_gib: float


@dataclass(frozen=True)
class Figures:
    """All figures. attention by head dim, pace by precision and head dim (times int8+fp8's tile), links and programs by name.

    rows: whole things measured, to compare predictions with: dicts as `predict` takes them, with "ms".
    """

    gpu: Gpu
    attention: Mapping[int, Tile]
    pace: Mapping[str, Mapping[int, float]]
    around: Around
    links: Mapping[str, Link]
    programs: Mapping[str, Program]
    video: VideoFigures
    rows: tuple[Mapping[str, Any], ...] = ()


def load_figures(*paths: str | Path) -> Figures:
    """The package's figures; those that files in the same form have go before them, and their rows beside them.

    paths: such files, or those that the benchmark of several GPUs wrote: its times become rows.
    Raises ValueError for a file that is not such a one, naming the place in it.
    """
    known = read_json(MEASURED)
    rows = [dict(row, source=row.get("source", MEASURED.name)) for row in known.pop("rows")]
    for path in paths:
        given = read_json(path)
        if isinstance(given.get("attention"), list):
            given = {"rows": _rows_of_benchmark(given, str(path))}
        new_rows = given.pop("rows", [])
        if not isinstance(new_rows, list) or not all(isinstance(row, dict) for row in new_rows):
            raise ValueError(f"{path}: \"rows\" is a list of objects, each with what was measured and its ms")
        rows += [dict(row, source=row.get("source", str(path))) for row in new_rows]
        known = _over(known, {name: value for name, value in given.items() if name != "about"}, str(path))
    where = ", ".join(map(str, paths)) or str(MEASURED)
    group = lambda kind, name, value: _build(kind, _plain(value), f"{where}: {name}")
    return Figures(
        gpu=group(Gpu, "gpu", known["gpu"]),
        attention={int(dim): group(Tile, f"attention.{dim}", row) for dim, row in known["attention"].items()},
        pace={name: {int(dim): value for dim, value in _plain(row).items()} for name, row in known["pace"].items()},
        around=group(Around, "around", known["around"]),
        links={name: group(Link, f"links.{name}", row) for name, row in known["links"].items()},
        programs={name: group(Program, f"programs.{name}", row) for name, row in known["programs"].items()},
        video=group(VideoFigures, "video", known["video"]),
        rows=tuple(rows),
    )


def _rows_of_benchmark(report: Mapping, path: str) -> list[dict]:
    """Rows of what `bench parallel` wrote: attention on one GPU and layers, steps as the whole transformer, decoding.

    Exact methods are the framework's own and are left out, as are shapes of no known model, steps of compiled blocks and by
    recipes, decoding by tiles and other sizes.
    Raises ValueError where the file lacks something of it.
    """
    rows = []
    try:
        framework, keys = report["framework"], {name: report[name] for name in ("keys",) if name in report}
        for shape in (shape for shape in report["attention"] if shape["name"] in MODELS):
            same = {"model": shape["name"], "framework": framework, "precision": shape["precision"]}
            for method, measured in shape["methods"].items():
                split, *how = method.split(", ")
                if method == "one":
                    rows.append({"what": "attention", **same, "ms": measured["ms"]})
                elif "exact" not in method:
                    rows += _apart("layer", {**same, **USUAL, **keys}, split, how, measured)
        steps = (step for step in report.get("steps") or () if not step.get("compiled") and not names_recipe(step["precision"]))
        for step in steps:
            same = {"what": "transformer", "model": f"CogVideoX-{step['model']}", "framework": framework, **keys}
            same.update({name: step[name] for name in ("precision", "exchange", "output")})
            if step.get("cuda_graph"):
                same["cuda_graph"] = True
            for way, measured in step["ways"].items():
                split, *how = way.split(", ")
                rows += _apart("transformer", same, split, how, measured)
        decode = report.get("decode")
        if decode and decode["latents"] == DECODED:
            same = {"what": "decode", "model": "CogVideoX-2b", "framework": framework}
            shared = {"ulysses": decode["ranks"], "vae": decode["ranks"]}
            rows += [{**same, "ms": decode["ways"]["one"]["ms"]}, {**same, **shared, "ms": decode["ways"]["all"]["ms"]}]
    except (KeyError, TypeError, AttributeError) as reason:
        raise ValueError(f"{path} is not what `bench parallel` writes ({type(reason).__name__}: {reason})") from None
    return rows


def _apart(what: str, same: Mapping[str, Any], split: str, how: Sequence[str], measured: Mapping[str, Any]) -> list[dict]:
    """Rows of a split, as a whole and, where they were measured, computed alone and exchanged alone. how: what else travels
    than in `same`, by the benchmark's names."""
    row = {**same, "what": what, **_degrees(split)}
    for one in how:
        if one == "int8 output":
            row["output"] = "int8"
        elif one != "codes":
            row["exchange"] = one.removesuffix(" codes")
    return [{**row, "what": what + part, "ms": measured[name]}
            for part, name in (("", "ms"), (" computed", "computed_ms"), (" exchanged", "exchanged_ms")) if name in measured]


def _degrees(split: str) -> dict[str, int]:
    """Of "ulysses2 x ring2"."""
    return {name: int(degree) for name, degree in re.findall(r"([a-z]+)(\d+)", split)}


def named(table: Mapping[str, Any], name: str, kind: str) -> Any:
    """The entry; ValueError with those that exist."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; there are: {', '.join(map(str, table))}")
    return table[name]


def _over(known: dict, given: Mapping, where: str) -> dict:
    """`known` with what `given` has in its place; a figure may be given without the {"value", "source"} around it."""
    merged = dict(known)
    for name, value in given.items():
        inner = merged.get(name)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            merged[name] = _over(inner, value, f"{where}: {name}")
        elif isinstance(inner, dict) and "value" not in inner:
            raise ValueError(f"{where}: {name} is {json.dumps(value)}; an object with some of {', '.join(inner)} is expected")
        else:
            merged[name] = value
    return merged


def _plain(group: Mapping) -> dict:
    """A group without sources, each figure its value."""
    return {name: value["value"] if isinstance(value, Mapping) and "value" in value else value
            for name, value in group.items() if name != "source"}


def _build(kind: type, values: dict, where: str) -> Any:
    names = [field.name for field in fields(kind)]
    odd, missing = set(values) - set(names), set(names) - set(values)
    if odd or missing:
        raise ValueError(f"{where} has {', '.join(sorted(values))}; {', '.join(names)} are expected"
                         + (f" (unknown: {', '.join(sorted(odd))})" if odd else ""))
    for name, value in values.items():
        if name not in ("name", "models") and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{where}.{name} is {json.dumps(value)}; a number from 0 on is expected")
    return kind(**values)
