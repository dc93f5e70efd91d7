"""What a pipeline returns, and in which forms."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle

OUTPUT_TYPES = ("np", "frames", "pd", "latent")


@dataclass
class PipelineOutput:
    """What a call returns.

    Args:
        frames: "np": float32 array [B, F, H, W, 3] in [0, 1]; "frames": for each video a list of uint8 arrays [H, W, 3];
            "pd": float32 tensor [B, F, 3, H, W] in [0, 1]; "latent": float32 tensor [B, f, C, h, w].
        timings: seconds of "text_encode", "denoise" and "decode".
        seeds: the seed of each video, where the noise came from seeds.
    """

    frames: Any
    timings: dict[str, float] = field(default_factory=dict)
    seeds: list[int] | None = None


def postprocess(video: paddle.Tensor, output_type: str) -> Any:
    """[B, 3, F, H, W] about [-1, 1] to what `output_type` names."""
    video = paddle.clip(video.astype("float32") * 0.5 + 0.5, 0.0, 1.0)
    if output_type == "pd":
        return video.transpose([0, 2, 1, 3, 4]).contiguous()
    array = np.ascontiguousarray(video.numpy().transpose(0, 2, 3, 4, 1))
    if output_type == "np":
        return array
    return [list(one) for one in (array * 255).round().astype(np.uint8)]
