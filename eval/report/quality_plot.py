"""PSNR and SSIM over the frames of one video, drawn."""
from __future__ import annotations

from pathlib import Path

from lowbit_video.files import write_whole


def plot_quality(path: Path, figures: dict[str, list[float]], title: str) -> None:
    """PSNR and SSIM over the frames, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    frames = range(len(figures["ssim"]))
    upper.plot(frames, figures["psnr_db"], marker="o", markersize=3)
    upper.set_ylabel("PSNR (dB)")
    upper.set_title(title)
    lower.plot(frames, figures["ssim"], marker="o", markersize=3, color="tab:orange")
    lower.set_ylabel("SSIM")
    lower.set_xlabel("frame")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False)
    with write_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
