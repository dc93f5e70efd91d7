"""The full-precision twin of a video: the same seed without the hook, both side by side, per-frame figures and a plot."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lowbit_video.eval.metrics.psnr import psnr
from lowbit_video.eval.metrics.ssim import ssim
from lowbit_video.eval.report.quality_plot import plot_quality
from lowbit_video.pipelines import export_to_video, side_by_side

from ..files import write_json
from .job import Job
from .run_pipeline import run_pipeline, seconds_line, timed


def compare_twin(pipe: Any, job: Job, video: np.ndarray, out: Path, files: dict[str, Path], say: Any) -> dict[str, Any]:
    """Makes the twin of `video` with the bare pipeline; names in `files` what it writes.

    returns: seconds by stage, PSNR (dB) and SSIM of every frame and their means.
    """
    say("\nfull precision, the same seed:")
    twin = run_pipeline(pipe, job)
    files["full_precision"] = out / "full_precision.mp4"
    files["side_by_side"] = out / "side_by_side.mp4"
    twin.seconds["mp4"] = timed(export_to_video, twin.video, files["full_precision"], job.fps)
    joined = side_by_side([video, twin.video], [job.attention, "full precision"])
    export_to_video(joined, files["side_by_side"], job.fps)
    say(seconds_line(twin.seconds, job.steps))
    figures = {"psnr_db": [float(x) for x in psnr(video, twin.video)], "ssim": [float(x) for x in ssim(video, twin.video)]}
    files["quality"], files["quality_plot"] = out / "quality.json", out / "quality.png"
    write_json(files["quality"], {"precision": job.attention, "seed": job.seed, "prompt": job.prompt, **figures})
    plot_quality(files["quality_plot"], figures, f"{job.attention} against full precision, seed {job.seed}")
    means = {f"mean_{name}": sum(values) / len(values) for name, values in figures.items()}
    say(f"against full precision: PSNR {means['mean_psnr_db']:.2f} dB (worst frame {min(figures['psnr_db']):.2f}), "
        f"SSIM {means['mean_ssim']:.4f} (worst frame {min(figures['ssim']):.4f})")
    return {"seconds": twin.seconds, **means, **figures}
