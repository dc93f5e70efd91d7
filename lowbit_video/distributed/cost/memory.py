"""Bytes of tensors that live at once while a video is made: by the code's own shapes; tests hold it to runs."""
from __future__ import annotations

from collections.abc import Sequence

from .rest import PIECE

NORM_TENSORS = 5
"""Of the size of what a spatial norm of the VAE reads: that, its scale, its shift, it normalised, and their product."""
CACHED_FRAMES = 2
"""That a causal convolution keeps for the frames that follow."""
VAE_CHANNELS, VAE_LAYERS = (128, 256, 256, 512), 3
"""Of the published VAEs: channels from the pixels inwards, residual blocks a level."""


def decode_bytes(batch: int, latent_frames: int, height: int, width: int, bytes_a_value: int, temporal: int = 4,
                 channels: Sequence[int] = VAE_CHANNELS, layers: int = VAE_LAYERS) -> int:
    """Bytes that decoding holds at most besides weights: its largest norm, every convolution's cache, the video so far.

    latent_frames: of a clip. height, width: of its video or of a tile of it, pixels. temporal: frames of a latent one. What a
    library's convolutions take for themselves comes on top.
    """
    first = min(latent_frames, PIECE + latent_frames % 2)
    frames = temporal * (first - 1) + 1 if first % 2 else temporal * first
    inner = channels[min(1, len(channels) - 1)]  # what the last level is given
    most = max(NORM_TENSORS * inner, inner + NORM_TENSORS * channels[0])
    rows = channels[-1] * 4 / 4 ** (len(channels) - 1)  # the innermost blocks: two of two convolutions
    before = channels[-1]
    for level, own in reversed(list(enumerate(channels))):
        rows += (before + own * (2 * layers + 1)) / 4**level
        before = own
    made = 3 * temporal * latent_frames
    return int(batch * height * width * (most * frames + CACHED_FRAMES * rows + made)) * bytes_a_value
