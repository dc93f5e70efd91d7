"""The report: one self-contained HTML page from a folder of results, and the same in short as Markdown and PNG.

Nothing is fetched: style, script, films and figures are inside the page, so that it works from a disk, a mail or an artefact.
The films of a prompt are tiles of one H.264 film, which keeps all runs in step; they come from the run's lossless clips.
"""
from __future__ import annotations

import base64
import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..compare.candidates import EXACT, FLOOR
from ..compare.clips import write_reel
from ..compare.layers import FILE as LAYERS_FILE
from ..compare.layers import LayerTable
from ..compare.store import Store
from ..metrics import registry
from ..video import BadVideoError, read_video
from .charts import interval_text, over_floor_text, plain, show_value
from .page import NOTES, candidates_of, facts, label_of, page, prompts_unfollowed
from .summary import Row, Summary, summarise

PAGE, MARKDOWN, PICTURE = "report.html", "report.md", "report.png"
IN_MARKDOWN = ("psnr", "ssim", "ms_ssim", "lpips", "adherence.all")
TILE_SIDE = 560  # pixels; wider videos are shown at half, a third, ... of their size
THUMBNAIL_SIDE = 144  # pixels


@dataclass
class Report:
    """Everything the page shows; `load` gathers it.

    videos: result lines by (prompt, seed, run). run: the latest line that says how they were made. speed: {run: figure},
    named by `speed_label`; either seconds of this evaluation or speed-ups of a benchmark (`faster_is_higher`).
    """

    summary: Summary
    videos: dict[tuple, dict]
    run: dict
    folder: Path
    layers: LayerTable | None = None
    speed: dict[str, float] = field(default_factory=dict)
    speed_label: str = "seconds a video"
    faster_is_higher: bool = False

    @property
    def on_reference(self) -> bool:
        """Whether the times shown are those of the NumPy reference, which are not a speed."""
        ran = [variant for row in self.candidates() for variant in row.attention]
        return not self.faster_is_higher and any("(reference" in variant for variant in ran)

    def candidates(self) -> list[Row]:
        """The rows that are neither exact nor the floor."""
        return candidates_of(self.summary)

    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of the summary."""
        return [(p, s) for p in self.summary.prompts for s in self.summary.seeds if (p, s, EXACT) in self.videos]


def load(folder, *, speed=None, speed_shape=None, layers=None) -> Report:
    """Read a folder of results.

    Args:
        folder: of `compare`. speed: the JSON of `lowbit-video bench`, whose speed-ups then stand beside the quality.
        speed_shape: see `read_speed`. layers: a layer table; by default the folder's layers.npz, if there is one.

    Raises:
        FileNotFoundError, ValueError: no results, nothing finished, or a speed file without usable rows.
    """
    store = Store(folder, write=False)
    videos, runs = store.videos(), store.runs()
    if not runs or not videos:
        raise ValueError(f"{store.path}: no finished video yet")
    summary = summarise(videos, list(dict.fromkeys(name for run in runs for name in run["runs"])))
    table = Path(layers) if layers else Path(folder) / LAYERS_FILE
    report = Report(summary, {(v["prompt"], v["seed"], v["run"]): v for v in videos}, runs[-1], Path(folder))
    if layers or table.is_file():
        report.layers = LayerTable.load(table)
    if any("timings" in video for video in videos):
        report.speed_label = "denoising seconds a video"
    report.speed = {row.run: row.seconds for row in summary.rows if not math.isnan(row.seconds)}
    if speed:
        report.speed, report.speed_label = read_speed(speed, speed_shape)
        report.faster_is_higher = True
    if report.on_reference:
        report.speed_label += ", CPU reference, not a speed"
    return report


def read_speed(path, shape: str | None = None) -> tuple[dict[str, float], str]:
    """Speed-ups over the benchmark's own baseline from its JSON: ({run: speed-up}, label).

    "exact" is the best exact attention among the rows with a precision, else the baseline itself.

    Args:
        shape: the shape's name in the benchmark; by default the one with the most tokens. For each precision its fastest
            variant is taken.

    Raises:
        ValueError: no row with a precision and a speed-up, or none of that shape (lists those there are).
    """
    content = json.loads(Path(path).read_text())
    rows = [r for r in content.get("rows", []) if r.get("precision") and r.get("speedup") and not r.get("error")]
    if not rows:
        raise ValueError(f"{path}: no row with a precision and a speedup; give the JSON of `lowbit-video bench`")
    if shape:
        there = sorted({str(r.get("shape")) for r in rows})
        rows = [r for r in rows if r.get("shape") == shape]
        if not rows:
            raise ValueError(f"{path}: no shape {shape!r} in it; there are: {', '.join(there)}")
    tokens = max(r["tokens"] for r in rows)
    speed = {EXACT: 1.0}
    for row in rows:
        if row["tokens"] == tokens:
            speed[row["precision"]] = max(row["speedup"], speed.get(row["precision"], 0.0))
    about = content.get("about", {})
    baselines = {str(r["method"]) for r in content["rows"] if r.get("speedup") == 1 and r.get("method")}
    over = f" over {baselines.pop()}" if len(baselines) == 1 else ""
    gpu = about.get("gpu") or about.get("device") or "GPU"
    return speed, f"attention speed-up{over}, {gpu}, {shape + ', ' if shape else ''}{tokens} tokens"


def write_report(folder, *, out=None, speed=None, speed_shape=None, layers=None, films: bool = True,
                 say: Callable[[str], None] = print) -> dict[str, Path]:
    """Write report.html, report.md and report.png.

    Args:
        folder: results of `compare`. out: where to write; the same folder by default. films: embed the videos.
        speed, speed_shape, layers: see `load`.

    Returns:
        {"html": path, "markdown": path, "png": path}.
    """
    report = load(folder, speed=speed, speed_shape=speed_shape, layers=layers)
    out = Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    from .picture import draw_picture

    paths = {"html": out / PAGE, "markdown": out / MARKDOWN, "png": out / PICTURE}
    write_whole(paths["html"], page(report, make_reels(report, say) if films else {}).encode())
    write_whole(paths["markdown"], markdown(report).encode())
    write_whole(paths["png"], draw_picture(report))
    for path in paths.values():
        say(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return paths


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".part-{path.name}")
    part.write_bytes(content)
    os.replace(part, path)


# ---- films ----


@dataclass(frozen=True)
class Reel:
    """One prompt's film: H.264 bytes, its runs in reading order, columns of tiles, a tile's size, frames, a small picture."""

    film: bytes
    runs: list[str]
    columns: int
    width: int
    height: int
    frames: int
    thumbnail: str


def make_reels(report: Report, say: Callable[[str], None] = print) -> dict[tuple, Reel]:
    """The films of all finished prompts; a clip that is gone is left out, and said."""
    reels = {}
    for pair in report.pairs():
        clips = {}
        for row in report.summary.rows:
            line = report.videos.get((*pair, row.run), {})
            if row.run == FLOOR or "clip" not in line:
                continue
            try:
                clips[row.run] = read_video(report.folder / line["clip"])
            except BadVideoError as error:
                say(f"left out of the films: {error}")
        if len({clip.shape for clip in clips.values()}) == 1:
            reels[pair] = make_reel(clips, report.run["settings"]["fps"])
    return reels


def make_reel(clips: dict[str, np.ndarray], fps: float) -> Reel:
    """One film of clips [F, H, W, 3] of one shape."""
    factor = -(-next(iter(clips.values())).shape[2] // TILE_SIDE)
    videos = [smaller(clip, factor) for clip in clips.values()]
    frames, height, width = videos[0].shape[:3]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "reel.mp4"
        _, columns = write_reel(path, videos, fps)
        return Reel(path.read_bytes(), list(clips), columns, width, height, frames, thumbnail(videos[0][frames // 2]))


def smaller(clip: np.ndarray, factor: int) -> np.ndarray:
    """uint8 [F, H, W, 3] averaged over factor x factor pixels."""
    if factor == 1:
        return clip
    frames, height, width = clip.shape[0], clip.shape[1] // factor, clip.shape[2] // factor
    blocks = clip[:, : height * factor, : width * factor].reshape(frames, height, factor, width, factor, 3)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


def thumbnail(frame: np.ndarray) -> str:
    """A JPEG data URL of a frame."""
    import imageio.v3 as iio

    buffer = io.BytesIO()
    small = smaller(frame[None], max(1, frame.shape[1] // THUMBNAIL_SIDE))[0]
    iio.imwrite(buffer, small, extension=".jpg", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- Markdown ----


def markdown(report: Report) -> str:
    """The summary for a README: a table with intervals and the floor, and how it was made."""
    figures = [f for f in report.summary.figures if f in IN_MARKDOWN]
    units = {f: registry.metric(f).unit for f in figures}
    head = [label_of(f) + (f" ({units[f]})" if units[f] else "") for f in figures]
    head = ["run", *head, "above the floor", report.speed_label]
    names = {EXACT: "exact", FLOOR: "noise floor (exact, reordered)"}
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report.summary.rows:
        cells = [names.get(row.run, f"`{row.run}`")]
        for figure in figures:
            cell = row.cells.get(figure)
            cells.append(f"{show_value(figure, cell.value.value)} {interval_text(figure, cell.value)}" if cell else "")
        over = row.cells["psnr"].times_floor if "psnr" in row.cells else None
        cells.append(over_floor_text(over) if over else "failed" if row.failed else "")
        cells.append(plain(report.speed[row.run]) if row.run in report.speed else "")
        lines.append("| " + " | ".join(cells) + " |")
    notes = (f"{'; '.join(facts(report))}. Paired with the exact video of the same prompt and noise; brackets: 95 % bootstrap "
             "intervals over prompts; above the floor: root mean square error in dB over that of a reordered exact run. "
             f"The videos: [{PAGE}]({PAGE}).")
    notes += f"\n\n{NOTES['unfollowed']}" if prompts_unfollowed(report.summary) else ""
    notes += f"\n\n{NOTES['speed-up']}" if report.faster_is_higher else ""
    return f"<!-- made by `lowbit-video eval report` -->\n\n![Quality with intervals, and speed]({PICTURE})\n\n" \
        + "\n".join(lines) + f"\n\n{notes}\n"
