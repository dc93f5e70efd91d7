"""Short clips first: which lengths when, how many at a time, and where their frames lie."""
from __future__ import annotations

import numpy as np
import torch
from tokens import MAX_TOKENS


def curriculum(text: str, latent_frames: int) -> list[tuple[int, float]]:
    """"1:0.3,3:0.3,9:0.4" as (latent frames, share of the diffusion time up to which they are used), in order.

    Raises:
        ValueError: not of this form, more frames than a clip has, or it does not end with whole clips."""
    try:
        pairs = [(int(frames), float(share)) for frames, share in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"--curriculum {text!r}: write FRAMES:SHARE,FRAMES:SHARE such as 1:0.3,{latent_frames}:0.7") from None
    if any(share <= 0 or not 1 <= frames <= latent_frames for frames, share in pairs) or pairs[-1][0] != latent_frames:
        raise ValueError(f"--curriculum {text!r}: shares are positive, frames are 1 to {latent_frames} and {latent_frames} "
                         "come last, since the model is used on whole clips")
    ends = np.cumsum([share for _, share in pairs]) / sum(share for _, share in pairs)
    return [(frames, float(end)) for (frames, _), end in zip(pairs, ends)]


def batch_of(batch: int, frames: int, sizes) -> int:
    """Clips a step at `frames` latent frames: as many tokens as `batch` whole clips, at most four times the clips."""
    tokens = MAX_TOKENS + frames * sizes.height // 16 * (sizes.width // 16)
    whole = MAX_TOKENS + sizes.latent_frames * sizes.height // 16 * (sizes.width // 16)
    return int(batch * min(4.0, whole / tokens)) // 8 * 8


def model_positions(transformer) -> torch.Tensor:
    """The sincos positions of a whole clip, `[1, text + video tokens, width]`."""
    return transformer.patch_embed.pos_embedding


def first_frames(transformer, frames: int, positions: torch.Tensor) -> None:
    """Make a transformer take the first `frames` latent frames at the positions that they have in a whole clip.

    diffusers computes the same positions anew in every call for a length that is not its own; this saves that."""
    embed = transformer.patch_embed
    tokens = frames * (embed.sample_height // embed.patch_size) * (embed.sample_width // embed.patch_size)
    embed.sample_frames = (frames - 1) * embed.temporal_compression_ratio + 1
    embed.pos_embedding = positions[:, :embed.max_text_seq_length + tokens]
