"""This project's Paddle models whose step is timed: CogVideoX at published sizes, random weights."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
from lowbit_video.runtime import detect

from ..cogvideox import CONFIGS, LATENTS, TINY, TINY_LATENTS
from ..random_weights import fan_in, random_paddle

QK_GAIN = 1.5
"""Weight of Q's and K's norms, so that softmax has peaks: of even weights attention is a mean, and no check would see it."""


@dataclass(frozen=True)
class PaddleModel:
    """One size. config: what differs from the class's defaults. latents: frames, height, width of what one step denoises."""

    config: Mapping[str, Any]
    latents: tuple[int, int, int]
    batch: int = 2
    text: int | None = None
    fuses: bool = True

    def make(self, dtype: str, tiny: bool = False) -> tuple[Any, dict[str, Any]]:
        """(model, what its forward takes) on Paddle's current device, always the same values for a device."""
        model = random_paddle(lambda: CogVideoXTransformer3DModel(**(TINY if tiny else self.config)), dtype, spread)
        with paddle.no_grad():
            for block in model.transformer_blocks:
                for norm in (block.attn1.norm_q, block.attn1.norm_k):
                    norm.weight.scale_(QK_GAIN)  # they are one
        config, like, rng = model.config, model.proj_out.weight, np.random.default_rng(0)
        normal = lambda *shape: detect.runtime_of(like).from_numpy(rng.standard_normal(shape, np.float32), like, dtype)
        frames, height, width = TINY_LATENTS if tiny else self.latents
        return model, dict(
            hidden_states=normal(self.batch, frames, config.in_channels, height, width),
            encoder_hidden_states=normal(self.batch, config.max_text_seq_length, config.text_embed_dim),
            timestep=paddle.full([self.batch], 500, "int64"), image_rotary_emb=model.rotary_tables(frames, height, width))

    def leading_text(self, tiny: bool = False) -> int:
        """Text tokens that stand before the video's in its attention."""
        return TINY["max_text_seq_length"] if tiny else 226

    def tokens(self, config: Any, tiny: bool = False) -> int:
        """Video tokens of one sample."""
        patch = (config.patch_size_t or 1, config.patch_size, config.patch_size)
        return math.prod(-(-size // side) for size, side in zip(TINY_LATENTS if tiny else self.latents, patch))


def spread(name: str, shape: list[int]) -> float:
    """Standard deviation that keeps the size of what passes through; norms stay one and biases zero."""
    return fan_in(shape) ** -0.5 if len(shape) > 1 else 0.0


MODELS = {f"cogvideox-{size}": PaddleModel(config, LATENTS[size]) for size, config in CONFIGS.items()}
"""By the name that `bench step --models` takes."""
