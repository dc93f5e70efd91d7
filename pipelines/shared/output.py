"""What a pipeline returns, and in which forms."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle

from .video_files import BadFramesError

OUTPUT_TYPES = ("np", "frames", "pd", "latent")


@dataclass
class PipelineOutput:
    """What a call returns.

    Args:
        frames: "np": float32 array [B, F, H, W, 3] in [0, 1]; "frames": for each video a list of uint8 arrays [H, W, 3];
            "pd": float32 tensor [B, F, 3, H, W] in [0, 1]; "latent": float32 tensor [B, f, C, h, w].
        timings: seconds of "text_encode", "denoise" and "decode".
        seeds: the seed of each video, where the noise came from seeds.
        memory: GiB that the device held at most in each of these stages, weights included; empty where it does not tell (CPU).
    """

    frames: Any
    timings: dict[str, float] = field(default_factory=dict)
    seeds: list[int] | None = None
    memory: dict[str, float] = field(default_factory=dict)


def postprocess(video: paddle.Tensor, output_type: str) -> Any:
    """[B, 3, F, H, W] about [-1, 1] to what `output_type` names.

    Raises:
        BadFramesError: values that are NaN or infinite.
    """
    broken = video.size - int(paddle.isfinite(video).astype("int64").sum())
    if broken:
        raise BadFramesError(
            f"the video has {broken} NaN or infinite values of {video.size}; see whether the latents (output_type='latent') "
            "are finite; try weights in float32, or exact attention to see whether attention is the cause"
        )
    video = paddle.clip(video.astype("float32") * 0.5 + 0.5, 0.0, 1.0)
    if output_type == "pd":
        return video.transpose([0, 2, 1, 3, 4]).contiguous()
    array = np.ascontiguousarray(video.numpy().transpose(0, 2, 3, 4, 1))
    if output_type == "np":
        return array
    return [list(one) for one in (array * 255).round().astype(np.uint8)]
