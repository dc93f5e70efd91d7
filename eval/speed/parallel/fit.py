"""The model of cost beside what `bench parallel` measured, row by row; its figures fitted to that, for measured.json.

    python -m lowbit_video.eval.speed.parallel.fit FILE.json... [--only TEXT...] [--fit FIGURE...]

FILE: what `bench parallel` wrote, or rows as in measured.json. Without --fit: which figures matter for these rows. A figure is
named by its place in measured.json: programs.torch.elementwise_ps, links.nvlink.all_to_all_us, pace.exact.64, or of a model's
own programs.torch.models.CogVideoX-5b.elementwise_ps.
"""
from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from lowbit_video.distributed.cost.figures import USUAL, Figures, Program, load_figures
from lowbit_video.distributed.cost.split import predict

GROUPS = ("attention", "pace", "around", "links", "programs")
"""Figures that rows of `bench parallel` can tell of."""
STEPS = 12
"""Of Gauss and Newton."""
LEAST = 1.0
"""Where a figure that is 0 begins."""
NUDGE, CAUTION, FAR = 1e-4, 1e-6, 0.5
"""A figure's change by which its influence is measured, what keeps figures of no influence in their place, and the most that a
step changes one, all as parts of it."""

Row = Mapping[str, Any]


def figures_named(figures: Figures) -> dict[str, float]:
    """Every number of GROUPS, by its name."""
    found: dict[str, float] = {}

    def walk(name: str, value: Any) -> None:
        inner = {one.name: getattr(value, one.name) for one in fields(value)} if is_dataclass(value) else value
        if isinstance(inner, Mapping):
            for key, one in inner.items():
                walk(f"{name}.{key}", one)
        elif isinstance(inner, (int, float)):
            found[name] = float(inner)

    for group in GROUPS:
        walk(group, getattr(figures, group))
    return found


def with_figure(figures: Any, name: str, value: float) -> Any:
    """The figures with one number changed. Raises ValueError for one that there is not."""
    first, _, rest = name.partition(".")
    if isinstance(figures, Program) and first == "models":
        model, _, own = rest.rpartition(".")  # models have dots in their names
        return replace(figures, models={**figures.models, model: {**figures.models.get(model, {}), own: value}})
    if is_dataclass(figures):
        if first not in {one.name for one in fields(figures)}:
            raise ValueError(f"no figure {first!r}; there are: {', '.join(one.name for one in fields(figures))}")
        return replace(figures, **{first: with_figure(getattr(figures, first), rest, value) if rest else value})
    key = next((one for one in figures if str(one) == first), None)
    if key is None:
        raise ValueError(f"no figure {first!r}; there are: {', '.join(map(str, figures))}")
    return {**figures, key: with_figure(figures[key], rest, value) if rest else value}


def errors(rows: Sequence[Row], figures: Figures) -> np.ndarray:
    """Logarithms of modelled over measured, by row."""
    return np.array([math.log(predict(row, figures) / row["ms"]) for row in rows])


def influence(rows: Sequence[Row], figures: Figures, names: Sequence[str]) -> np.ndarray:
    """[rows, names]: by what part a prediction changes, for each part by which a figure does."""
    values, before = figures_named(figures), errors(rows, figures)
    columns = [(errors(rows, with_figure(figures, name, values[name] * (1 + NUDGE))) - before) / NUDGE for name in names]
    return np.array(columns).T.reshape(len(rows), len(names))


def fitted(rows: Sequence[Row], figures: Figures, names: Sequence[str]) -> Figures:
    """With these figures so that the squares of the rows' logarithmic errors are least; never below 0, hidden_share at most 1.

    Waves are whole, so the least found is one near where the figures were.
    """
    for name in names:
        known = figures_named(figures)
        value = known.get(name, known.get(re.sub(r"\.models\..*\.", ".", name)))  # a model has its framework's until then
        figures = with_figure(figures, name, value or LEAST)
    for _ in range(STEPS):
        slopes, off = influence(rows, figures, names), errors(rows, figures)
        moves = np.linalg.solve(slopes.T @ slopes + CAUTION * np.eye(len(names)), -slopes.T @ off)
        for name, move in zip(names, np.clip(moves, -FAR, FAR)):
            value = figures_named(figures)[name] * math.exp(move)
            figures = with_figure(figures, name, min(value, 1.0) if name.endswith("hidden_share") else value)
    return figures


def told(row: Row) -> str:
    """A row in a line: what was measured, without its time and file and what is usual."""
    shown = [f"{name} {value}" for name, value in row.items()
             if name not in ("what", "model", "ms", "source") and (name, value) not in USUAL.items()]
    return f"{row['what']} {row['model']} {' '.join(shown)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="what `bench parallel` wrote")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose line has all of these")
    parser.add_argument("--fit", nargs="+", default=[], metavar="FIGURE", help="figures to be fitted to the rows")
    args = parser.parse_args(argv)
    figures = load_figures(*args.files)
    rows = [row for row in figures.rows if row["source"] in args.files and all(text in told(row) for text in args.only)]
    if not rows:
        raise ValueError(f"no row of {', '.join(args.files)} has {' and '.join(args.only)}")
    if args.fit:
        figures = fitted(rows, figures, args.fit)
    off = errors(rows, figures)
    for row, error in zip(rows, off):
        print(f"{row['ms']:9.3f} ms, modelled {row['ms'] * math.exp(error):9.3f} ({math.expm1(error):+6.1%})  {told(row)}")
    print(f"{len(rows)} rows; off by {np.sqrt((off**2).mean()):.1%} in the mean square, {np.abs(off).max():.1%} at most")
    if args.fit:
        print("\n".join(f"{name}: {figures_named(figures)[name]:.4g}" for name in args.fit))
        return
    names = list(figures_named(figures))
    matters = np.abs(influence(rows, figures, names)).mean(0)
    print("a tenth more of a figure changes a prediction, in the mean, by:")
    print("\n".join(f"{share / 10:7.2%}  {name}" for share, name in sorted(zip(matters, names), reverse=True) if share > 1e-3))


if __name__ == "__main__":
    main()
