"""Short and small clips first: which when, how many at a time, and where their tokens lie."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from models import Sizes


class Phase(NamedTuple):
    """A part of the training, up to the share `end` of the diffusion time: clips of `frames` latent frames, of a `shrink`-th of
    the height and width, `batch` a step (0: as `batch_of` says)."""

    frames: int
    end: float
    shrink: int = 1
    batch: int = 0


def curriculum(text: str, latent_frames: int) -> list[Phase]:
    """"1/2:0.1:512,13/2:0.5,13:0.4": latent frames, by how much height and width are divided, share of the diffusion time, and
    clips a step; in order.

    Raises:
        ValueError: not of this form, more frames than a clip has, or it does not end with whole clips."""
    phases = []
    try:
        for part in text.split(","):
            kind, share, *batch = part.split(":")
            frames, *shrink = kind.split("/")
            phases.append((int(frames), float(share), *map(int, shrink or [1]), *map(int, batch or [0])))
        wellformed = all(len(phase) == 4 for phase in phases)
    except ValueError:
        wellformed = False
    if not wellformed:
        raise ValueError(f"--curriculum {text!r}: write FRAMES:SHARE,FRAMES:SHARE such as 1:0.3,{latent_frames}:0.7; FRAMES/2 "
                         "for clips of half the height and width, FRAMES:SHARE:BATCH for so many a step")
    if any(share <= 0 or batch < 0 or shrink not in (1, 2, 4) or not 1 <= frames <= latent_frames
           for frames, share, shrink, batch in phases) or phases[-1][0] != latent_frames or phases[-1][2] != 1:
        raise ValueError(f"--curriculum {text!r}: shares are positive, frames are 1 to {latent_frames}, divided by 1, 2 or 4, "
                         f"and {latent_frames} come last, since the model is used on whole clips")
    ends = np.cumsum([share for _, share, _, _ in phases]) / sum(share for _, share, _, _ in phases)
    return [Phase(frames, float(end), shrink, batch) for (frames, _, shrink, batch), end in zip(phases, ends)]


def batch_of(batch: int, phase: Phase, sizes: Sizes) -> int:
    """Clips a step: as many tokens as `batch` whole clips, at most four times the clips, unless the phase says it."""
    whole, tokens = sizes.tokens(sizes.latent_frames), sizes.tokens(phase.frames, phase.shrink)
    return phase.batch or int(batch * min(4.0, whole / tokens)) // 8 * 8


def model_positions(transformer) -> torch.Tensor | None:
    """The sincos positions of a whole clip, `[1, text + video tokens, width]`; None for a model that rotates."""
    return getattr(transformer.patch_embed, "pos_embedding", None)


def first_frames(transformer, frames: int, positions: torch.Tensor | None) -> None:
    """Make a transformer take the first `frames` latent frames at the positions that they have in a whole clip.

    diffusers computes the same positions anew in every call for a length that is not its own; this saves that."""
    if positions is None:
        return
    embed = transformer.patch_embed
    tokens = frames * (embed.sample_height // embed.patch_size) * (embed.sample_width // embed.patch_size)
    embed.sample_frames = (frames - 1) * embed.temporal_compression_ratio + 1
    embed.pos_embedding = positions[:, :embed.max_text_seq_length + tokens]


def rotations(sizes: Sizes, frames: int, shrink: int, device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines `[video tokens, head dim]` for a model that rotates, None for one that does not.

    A smaller frame covers the same positions with fewer patches, as in diffusers' pipeline."""
    if not sizes.rotary:
        return None
    rows, columns = sizes.height // 16, sizes.width // 16
    return get_3d_rotary_pos_embed(sizes.head_dim, ((0, 0), (rows, columns)), (rows // shrink, columns // shrink), frames,
                                   device=device)
