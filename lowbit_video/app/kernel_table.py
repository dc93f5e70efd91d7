"""The table of kernels that exist, generated from VARIANTS: for a terminal, for Markdown, and checked in a README."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

from lowbit_video.kernels.formats import EXACT_FORMATS
from lowbit_video.kernels.variants import VARIANTS, KernelVariant

BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
"""The README's table stands between these two lines."""
HEADER = ("kernel", "backend", "Q/K", "P.V", "runs on", "head dim", "scales per", "tensors", "also", "note")


def _row(variant: KernelVariant) -> tuple[str, ...]:
    where = "CPU" if variant.min_arch is None else _archs(variant)
    dims = f"32-{max(variant.head_dims)}, step 8" if variant.padded else ", ".join(map(str, variant.head_dims))
    qk = ", ".join(q if q == k else f"{q}/{k}" for q, k in variant.qk)
    exact = all(q in EXACT_FORMATS for q, _ in variant.qk)
    return (variant.name, variant.backend, qk, "as Q/K" if exact else ", ".join(variant.pv), where, dims,
            "-" if exact else ", ".join(variant.granularities), ", ".join(variant.dtypes),
            ", ".join(sorted(f.replace("_", " ") for f in variant.features)),
            variant.note + ("" if variant.automatic else f"; by name only: backend={variant.backend!r}"))


def _archs(variant: KernelVariant) -> str:
    low = "sm_{}{}".format(*variant.min_arch)
    if variant.max_arch is None:
        return f"{low} and later"
    return low if variant.max_arch == variant.min_arch else f"{low} to sm_{variant.max_arch[0]}{variant.max_arch[1]}"


def rows() -> list[tuple[str, ...]]:
    """One row per variant, in the order in which "auto" tries them."""
    return [_row(variant) for variant in VARIANTS]


def plain_table() -> str:
    """The table for a terminal."""
    table = [HEADER, *rows()]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table() -> str:
    """The table for the README."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join((f"`{row[0]}`", *row[1:])) + " |" for row in rows()]
    return "\n".join(lines)


def _split(text: str, path: Path) -> tuple[str, str, str]:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} has no block for the table: put the lines {BEGIN} and {END} where it belongs, once each")
    before, rest = text.split(BEGIN)
    block, after = rest.split(END)
    return before + BEGIN, block, END + after


def check(path: str | Path) -> bool:
    """Whether the block of that file equals the generated table. ValueError if it has no such block."""
    path = Path(path)
    return _split(path.read_text(encoding="utf-8"), path)[1].strip() == markdown_table()


def write(path: str | Path) -> None:
    """Put the generated table into the block of that file. ValueError if it has no such block."""
    path = Path(path)
    before, _, after = _split(path.read_text(encoding="utf-8"), path)
    path.write_text(f"{before}\n{markdown_table()}\n{after}", encoding="utf-8")


def shipped_line() -> str:
    """Who serves launches here, and what was shipped compiled."""
    from lowbit_video.kernels.shipped.choice import ENVIRONMENT, chosen
    from lowbit_video.kernels.shipped.store import manifest

    told = manifest()
    return (f"{len(told['builds'])} kernels are shipped compiled for {told['arch']} ({told['compiler']}, "
            f"ptxas {told['ptxas']}); who serves here ({ENVIRONMENT}): {chosen().why}")


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Registers `lowbit-video kernels`."""
    parser = subparsers.add_parser("kernels", help="the table of kernels that exist")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--markdown", action="store_true", help="as Markdown")
    choice.add_argument("--json", action="store_true", help="as JSON")
    choice.add_argument("--check", metavar="README", help="exit 1 unless the table in that file is up to date")
    choice.add_argument("--write", metavar="README", help="put the table into that file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints, checks or writes the table."""
    if args.check:
        if check(args.check):
            return 0
        print(f"the table in {args.check} is out of date; run: lowbit-video kernels --write {args.check}")
        return 1
    if args.write:
        write(args.write)
    elif args.json:
        print(json.dumps([dict(zip(HEADER, row)) for row in rows()], indent=1))
    elif args.markdown:
        print(markdown_table())
    else:
        print(plain_table())
        print(f"\n{shipped_line()}")
        print("backend=\"auto\" takes the first that serves a call; `lowbit-video doctor` says which run on this machine.")
    return 0
