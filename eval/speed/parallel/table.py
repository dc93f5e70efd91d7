"""What `bench parallel` measured, as a page of Markdown, or as the short table of the README.

    python -m lowbit_video.eval.speed.parallel.table FILE.json... [--short]
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowbit_video.files import read_json

Result = Mapping[str, Any]

FRAMEWORKS = {"paddle": "Paddle", "torch": "PyTorch"}
SHARE = "of an even share"
ABOUT = (f"\"{SHARE.capitalize()}\": one GPU's time, shared evenly, over this time; at 100 % N GPUs are N times as fast. Times "
         "are the slowest rank's, medians over turns from a cold L2 cache; all of a framework's are of one run.")


def markdown(results: Sequence[Result]) -> str:
    """A page: attention by shape, steps by model, decoding; all results, the losers too. What was not measured is left out."""
    lines = ["# One video on several GPUs", ""]
    lines += [f"- {line}" for line in map(_machine, results)]
    lines += ["", ABOUT]
    for title, columns, rows in [*_attention(results), *_steps(results), *_decode(results)]:
        lines += ["", f"## {title}", "", *_table(columns, rows)]
    return "\n".join(lines) + "\n"


def short(results: Sequence[Result]) -> str:
    """The README's table: frameworks side by side, without exact attention; what else differs between them is shown of both."""
    frameworks = [name for name in FRAMEWORKS if any(result["framework"] == name for result in results)]
    cells: dict[str, dict[str, Sequence[str]]] = {}
    for part in (_attention_lines, _step_lines, _decode_lines):
        for result in results:
            for title, *found in part(result):
                cells.setdefault(title, {})[result["framework"]] = found
    rows = []
    for title, found in cells.items():
        there = [found[name] for name in frameworks if name in found]
        both = [" / ".join(dict.fromkeys(one[column] for one in there)) for column in (1, 2)]
        rows.append([title, *(found[name][0] if name in found else "" for name in frameworks), *both])
    columns = ("on several GPUs", *(FRAMEWORKS[name] for name in frameworks), "bytes of 16 bit", "how equal")
    return "\n".join(_table(columns, rows)) + "\n"


def _machine(result: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return (f"{FRAMEWORKS[result['framework']]}: {result['ranks']} x {result['gpu']}; {versions}; driver {result['driver']}; "
            f"commit {result['commit']}")


def _attention(results: Sequence[Result]) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    shapes: dict[str, list[list[str]]] = {}
    for result in results:
        for shape in result["attention"]:
            title = f"Attention of a layer: ({', '.join(map(str, shape['shape']))}) {shape['name']}, {shape['precision']}"
            shapes.setdefault(title, []).extend(
                [FRAMEWORKS[result["framework"]], _gpus(name, result), name, f"{row['ms']:.3f}", _share(name, row),
                 f"{row['l1']:.4f}", *_bytes(row["bytes"])] for name, row in shape["methods"].items())
    columns = ("framework", "GPUs", "method", "ms", SHARE, "rel. L1", "MB sent", "of 16 bit")
    return ((title, columns, rows) for title, rows in shapes.items())


def _steps(results: Sequence[Result]) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    models: dict[str, list[list[str]]] = {}
    for result in results:
        for step in result["steps"]:
            title = f"A step of CogVideoX-{step['model']}, {step['precision']}"
            models.setdefault(title, []).extend(
                [FRAMEWORKS[result["framework"]], _gpus(name, result), name, f"{row['ms']:.1f}", _share(name, row),
                 _sqnr(name, row), *_bytes(row["bytes"])] for name, row in step["ways"].items())
    columns = ("framework", "GPUs", "split", "ms", SHARE, "SQNR, dB", "MB sent", "of 16 bit")
    return ((title, columns, rows) for title, rows in models.items())


def _decode(results: Sequence[Result]) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    sizes: dict[str, list[list[str]]] = {}
    for result in results:
        if result["decode"]:
            sizes.setdefault(f"Decoding {_clip(result['decode'])}", []).extend(
                [FRAMEWORKS[result["framework"]], _gpus(name, result), name, f"{row['ms']:.0f}",
                 "" if name.startswith("one") else f"{row['speedup']:.2f}x", "yes" if row["equal"] else "NO"]
                for name, row in result["decode"]["ways"].items())
    columns = ("framework", "GPUs", "way", "ms", "speed-up", "equal to the bit")
    return ((title, columns, rows) for title, rows in sizes.items())


def _attention_lines(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """(what, time, bytes, how equal) of a line of the short table; so the two below."""
    for shape in result["attention"]:
        for name, row in shape["methods"].items():
            if "exact" not in name:
                yield (f"a layer's attention, {shape['shape'][2]} tokens: {_whole(name)}", _time(name, row, f"{row['ms']:.2f}"),
                       _bytes(row["bytes"])[1], f"L1 {row['l1']:.4f}")


def _step_lines(result: Result) -> Iterator[tuple[str, str, str, str]]:
    for step in result["steps"]:
        for name, row in step["ways"].items():
            sqnr = _sqnr(name, row)
            yield (f"a step of {step['model']}: {_whole(name)}", _time(name, row, f"{row['ms']:.0f}"), _bytes(row["bytes"])[1],
                   sqnr and ("equal" if row["sqnr_db"] is None else f"{sqnr} dB"))


def _decode_lines(result: Result) -> Iterator[tuple[str, str, str, str]]:
    if result["decode"]:
        for name, row in result["decode"]["ways"].items():
            alone = name.startswith("one")
            yield (f"decoding {_clip(result['decode'])}: {_whole(name)}",
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


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns), *("| " + " | ".join(row) + " |" for row in rows)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `bench parallel` wrote")
    parser.add_argument("--short", action="store_true", help="the README's table instead of the page")
    args = parser.parse_args(argv)
    print((short if args.short else markdown)([read_json(path) for path in args.files]), end="")


if __name__ == "__main__":
    main()
