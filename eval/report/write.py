"""The report: one self-contained HTML page from a folder of results, and the same in short as Markdown and PNG.

Nothing is fetched: style, script, films and figures are inside the page, so that it works from a disk, a mail or an artefact.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from lowbit_video.files import write_whole
from lowbit_video.installing import pip_install

from ..compare.clips import FILM_CRF
from .data import MARKDOWN, PAGE, PICTURE, load
from .films import TILE_SIDE, make_reels
from .markdown import markdown
from .page import page
from .picture import draw_picture


def check_packages() -> None:
    """Raises ImportError, which names what to install, where the picture cannot be drawn: to be asked before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"a report has a picture, which matplotlib draws: {pip_install('eval')} (`eval compare` "
                          "does without by --no-report)")


def write_report(folder, *, out=None, speed=None, speed_shape=None, layers=None, films: bool = True,
                 tile_side: int = TILE_SIDE, film_crf: int = FILM_CRF,
                 say: Callable[[str], None] = print) -> dict[str, Path]:
    """Write report.html, report.md and report.png.

    Args:
        folder: results of `compare`. out: where to write; the same folder by default. films: embed the videos,
            each at most `tile_side` pixels wide, as H.264 of the constant rate factor `film_crf` (0 to 51; 6 more make the page
            half as large or less, and it says what that costs).
        speed, speed_shape, layers: see `data.load`.

    Returns:
        {"html": path, "markdown": path, "png": path}.

    Raises:
        ImportError: see `check_packages`.
    """
    check_packages()
    report = load(folder, speed=speed, speed_shape=speed_shape, layers=layers)
    out = Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    paths = {"html": out / PAGE, "markdown": out / MARKDOWN, "png": out / PICTURE}
    makers = {"html": lambda: page(report, make_reels(report, say, tile_side, film_crf) if films else {}).encode(),
              "markdown": lambda: markdown(report).encode(), "png": lambda: draw_picture(report)}
    for kind, path in paths.items():
        with write_whole(path) as part:
            part.write_bytes(makers[kind]())
    for path in paths.values():
        say(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return paths
