"""What `bench parallel` measured, as a page of Markdown, or as the short table of the README.

    python -m lowbit_video.eval.speed.parallel.table FILE.json... [--short [--best N]]
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowbit_video.files import read_json

Result = Mapping[str, Any]

FRAMEWORKS = {"paddle": "Paddle", "torch": "PyTorch"}
SHARE, MEMORY, COMPUTED, EXCHANGED = "of an even share", "GiB a GPU", "computed, ms", "exchanged, ms"
ABOUT = (f"\"{SHARE.capitalize()}\": one GPU's time, shared evenly, over this time; at 100 % N GPUs are N times as fast. Times "
         "are the slowest rank's, medians over turns from a cold L2 cache.")
ONE_RUN = "All of a framework's are of one run."
COMPILED, GRAPH = ", blocks compiled", ", as a CUDA graph"
KEYS = {"gathered": ", codes of keys gathered"}
"""How a ring's keys reached each rank; in other runs they went round."""
NUMBERED = "A number behind a framework is that of its run."
APART = ("\"Computed\": the same without the transfers, for which what an earlier one brought is copied. \"Exchanged\": these "
         "transfers alone, one after the other.")
Line = tuple[str, str, float, str, str, str]
"""Of the short table: what, by which way, ms, and as shown time, bytes and how equal."""


def markdown(results: Sequence[Result]) -> str:
    """A page: attention by shape, steps by model, decoding; all results, the losers too. What was not measured is left out."""
    named = dict(zip(_names(results), results))
    numbered = list(named) != [FRAMEWORKS[one["framework"]] for one in results]
    lines = ["# One video on several GPUs", ""]
    lines += [f"- {_machine(name, result)}" + f": {_things(result)}" * numbered for name, result in named.items()]
    tables = [(title, *_filled(columns, rows)) for part in (_attention, _steps, _decode)
              for title, columns, rows in part(named)]
    lines += ["", " ".join([ABOUT, NUMBERED if numbered else ONE_RUN,
                            *[APART] * any(EXCHANGED in columns for _, columns, _ in tables)])]
    for title, columns, rows in tables:
        lines += ["", f"## {title}", "", *_table(columns, rows)]
    return "\n".join(lines) + "\n"


def short(results: Sequence[Result], best: int | None = None) -> str:
    """The README's table: frameworks side by side, without exact attention of a layer; what else differs between them is shown
    of both. best: of each thing only one GPU and so many ways, each framework's fastest.

    Raises ValueError where two results of a framework have the same thing.
    """
    frameworks = [name for name in FRAMEWORKS if any(result["framework"] == name for result in results)]
    layers = {(shape["shape"][2], shape["shape"][1]) for result in results for shape in result["attention"]}
    say_heads = len(dict(layers)) < len(layers)
    several = [len({one["precision"] for result in results for one in result[part]}) > 1 for part in ("attention", "steps")]
    cells: dict[str, dict[str, Sequence[str]]] = {}
    for part in (lambda result: _attention_lines(result, several[0], say_heads), lambda result: _step_lines(result, several[1]),
                 _decode_lines):
        for result in results:
            for title, *found in _fastest(list(part(result)), best):
                if result["framework"] in cells.setdefault(title, {}):
                    raise ValueError(f"{title}: twice of {FRAMEWORKS[result['framework']]}; the short table takes one run of "
                                     "each thing, the page several")
                cells[title][result["framework"]] = found
    rows = []
    for title, found in cells.items():
        there = [found[name] for name in frameworks if name in found]
        both = [" / ".join(dict.fromkeys(one[column] for one in there)) for column in (1, 2)]
        rows.append([title, *(found[name][0] if name in found else "" for name in frameworks), *both])
    columns = ("on several GPUs", *(FRAMEWORKS[name] for name in frameworks), "bytes of 16 bit", "how equal")
    return "\n".join(_table(columns, rows)) + "\n"


def _fastest(lines: Sequence[Line], best: int | None) -> Iterator[tuple[str, str, str, str]]:
    """(title, time, bytes, how equal) of the lines that are shown, in their order."""
    for thing, name, milliseconds, *shown in lines:
        faster = sum(other[2] < milliseconds for other in lines if other[0] == thing and not other[1].startswith("one"))
        if best is None or name.startswith("one") or faster < best:
            yield f"{thing}: {_whole(name)}", *shown


def _names(results: Sequence[Result]) -> list[str]:
    """A framework's name for each result, numbered where several are of one."""
    every = [result["framework"] for result in results]
    return [FRAMEWORKS[one] + (f" {every[:place + 1].count(one)}" if every.count(one) > 1 else "")
            for place, one in enumerate(every)]


def _machine(name: str, result: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (f"{name}: {result['ranks']} x {result['gpu']}; {versions}; driver {result['driver']}; "
            f"commit {result['commit']}")


def _things(result: Result) -> str:
    """What a run measured, in few words."""
    models = dict.fromkeys(f"{step['model']}{also(step)}" for step in result["steps"])
    things = ["a layer's attention"] * bool(result["attention"])
    things += [f"steps of {' and '.join(models)}"] * bool(models) + ["decoding"] * bool(result["decode"])
    return "; ".join(things) + KEYS.get(result.get("keys"), "")


def _attention(named: Mapping[str, Result]) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    shapes: dict[str, list[list[str]]] = {}
    for framework, result in named.items():
        for shape in result["attention"]:
            title = f"Attention of a layer: ({', '.join(map(str, shape['shape']))}) {shape['name']}, {shape['precision']}"
            shapes.setdefault(title, []).extend(
                [framework, _gpus(name, result), name, f"{row['ms']:.3f}", _share(name, row),
                 f"{row['l1']:.4f}", *_bytes(row["bytes"]), *_apart(row, 3)] for name, row in shape["methods"].items())
    columns = ("framework", "GPUs", "method", "ms", SHARE, "rel. L1", "MB sent", "of 16 bit", COMPUTED, EXCHANGED)
    return ((title, columns, rows) for title, rows in shapes.items())


def _steps(named: Mapping[str, Result]) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    models: dict[str, list[list[str]]] = {}
    for framework, result in named.items():
        for step in result["steps"]:
            title = f"A step of CogVideoX-{step['model']}, {step['precision']}{also(step)}"
            models.setdefault(title, []).extend(
                [framework, _gpus(name, result), name, f"{row['ms']:.1f}", _share(name, row),
                 _sqnr(name, row), *_bytes(row["bytes"]), _memory(row), *_apart(row, 1)] for name, row in step["ways"].items())
    columns = ("framework", "GPUs", "split", "ms", SHARE, "SQNR, dB", "MB sent", "of 16 bit", MEMORY, COMPUTED, EXCHANGED)
    return ((title, columns, rows) for title, rows in models.items())


def _decode(named: Mapping[str, Result]) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    sizes: dict[str, list[list[str]]] = {}
    for framework, result in named.items():
        if result["decode"]:
            sizes.setdefault(f"Decoding {_clip(result['decode'])}", []).extend(
                [framework, _gpus(name, result), name, f"{row['ms']:.0f}",
                 "" if name.startswith("one") else f"{row['speedup']:.2f}x", "yes" if row["equal"] else "NO",
                 _memory(row)]
                for name, row in result["decode"]["ways"].items())
    columns = ("framework", "GPUs", "way", "ms", "speed-up", "equal to the bit", MEMORY)
    return ((title, columns, rows) for title, rows in sizes.items())


def _attention_lines(result: Result, several: bool, say_heads: bool) -> Iterator[Line]:
    """several: whether there are several precisions, which are named then. say_heads: whether heads are."""
    for shape in result["attention"]:
        _, heads, tokens, _ = shape["shape"]
        thing = f"a layer's attention, {tokens} tokens" + (f", {heads} heads" if say_heads else "")
        thing += f", {shape['precision']}" if several else ""
        for name, row in shape["methods"].items():
            if "exact" not in name:
                yield (thing, name, row["ms"], _time(name, row, f"{row['ms']:.2f}"),
                       _bytes(row["bytes"])[1], f"L1 {row['l1']:.4f}")


def _step_lines(result: Result, several: bool) -> Iterator[Line]:
    """several: as above."""
    for step in result["steps"]:
        thing = f"a step of {step['model']}" + (f", {step['precision']}" if several else "") + also(step)
        for name, row in step["ways"].items():
            sqnr = _sqnr(name, row)
            yield (thing, name, row["ms"], _time(name, row, f"{row['ms']:.0f}"), _bytes(row["bytes"])[1],
                   sqnr and ("equal" if row["sqnr_db"] is None else f"{sqnr} dB"))


def also(step: Mapping[str, Any]) -> str:
    """What else a step is than launched kernel by kernel, in words."""
    return COMPILED * bool(step.get("compiled")) + GRAPH * bool(step.get("cuda_graph"))


def _decode_lines(result: Result) -> Iterator[Line]:
    if result["decode"]:
        for name, row in result["decode"]["ways"].items():
            alone = name.startswith("one")
            yield (f"decoding {_clip(result['decode'])}", name, row["ms"],
                   f"{row['ms'] / 1e3:.2f} s" + ("" if alone else f" ({row['speedup']:.2f}x)"), "",
                   "" if alone else "equal" if row["equal"] else "DIFFERS")


def _clip(decode: Mapping[str, Any]) -> str:
    """The size of a video that was decoded: 4 frames and 8 pixels a latent, but the first frame alone."""
    _, _, frames, height, width = decode["latents"]
    return f"{4 * (frames - 1) + 1} frames of {8 * height}x{8 * width}"


def _whole(name: str) -> str:
    """`one` as it reads in a line."""
    return name.replace("one", "one GPU", 1) if name.startswith("one") else name.replace("all", "all GPUs", 1)


def _time(name: str, row: Mapping[str, Any], milliseconds: str) -> str:
    share = _share(name, row)
    return f"{milliseconds} ms" + (f" ({share})" if share else "")


def _share(name: str, row: Mapping[str, Any]) -> str:
    return "" if name.startswith("one") else f"{100 * row['of_ideal']:.1f} %"


def _gpus(name: str, result: Result) -> str:
    return "1" if name.startswith("one") else str(result["ranks"])


def _sqnr(name: str, row: Mapping[str, Any]) -> str:
    if name.startswith("one"):
        return ""
    return "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"


def _bytes(counted: Mapping[str, Any] | None) -> tuple[str, str]:
    """(MB that the first rank sends, as a part of what 16 bits would have sent)."""
    if not counted or not counted["in_16_bit_total"]:
        return "", ""
    return f"{counted['sent_total'] / 1e6:.1f}", f"{counted['sent_total'] / counted['in_16_bit_total']:.3f}"


def _memory(row: Mapping[str, Any]) -> str:
    """Of the rank that takes most."""
    return f"{max(row['memory_gib']):.1f}" if row.get("memory_gib") else ""


def _apart(row: Mapping[str, Any], digits: int) -> tuple[str, str]:
    return tuple(f"{row[name]:.{digits}f}" if name in row else "" for name in ("computed_ms", "exchanged_ms"))


def _filled(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which nothing stands."""
    kept = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    return [columns[number] for number in kept], [[row[number] for number in kept] for row in rows]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns), *("| " + " | ".join(row) + " |" for row in rows)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `bench parallel` wrote")
    parser.add_argument("--short", action="store_true", help="the README's table instead of the page")
    parser.add_argument("--best", type=int, metavar="N", help="the short table has one GPU and the N fastest ways of each")
    args = parser.parse_args(argv)
    results = [read_json(path) for path in args.files]
    print(short(results, args.best) if args.short else markdown(results), end="")


if __name__ == "__main__":
    main()
