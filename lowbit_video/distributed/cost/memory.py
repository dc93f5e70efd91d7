"""Bytes of tensors that live at once while a video is made: by the code's own shapes; tests hold it to runs."""
from __future__ import annotations

from collections.abc import Sequence

from .figures import load_figures
from .models import GIB, Model
from .rest import PIECE

NORM_TENSORS = 5
"""Of the size of what a spatial norm of the VAE reads: that, its scale, its shift, it normalised, and their product."""
CACHED_FRAMES = 2
"""That a causal convolution keeps for the frames that follow."""
STEP_TENSORS = 13
"""Of the size of a block's input [B, tokens, channels] that are alive at a block's peak, feed-forward's wide ones included."""
TILE = (240, 360)
"""Pixels of the published VAEs' tiles."""
GUIDED = 2
"""Rows of a step: with the negative prompt and with the prompt."""
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


def step_bytes(batch: int, tokens: int, channels: int, bytes_a_value: int) -> int:
    """Bytes that a denoising step of the Paddle transformer holds at most besides weights and attention's codes.

    tokens: text and video. channels: of a token.
    """
    return STEP_TENSORS * batch * tokens * channels * bytes_a_value


def needed_gib(model: Model) -> tuple[float, float]:
    """(all parts on the device, with low memory): GiB that one guided video of the model's default size needs, in 16 bit.

    With low memory the text encoder, the transformer and decoding by tiles take turns beside the VAE's weights. Both count what
    the driver and the framework take for themselves.
    """
    size = model.frames, model.height, model.width
    step = step_bytes(GUIDED, model.text_tokens + model.video_tokens(*size), model.width_of_token, 2) / GIB
    latent = (model.frames - 1) // model.temporal + 1
    whole, tiled = (decode_bytes(1, latent, *pixels, 2, model.temporal) / GIB for pixels in (size[1:], TILE))
    always = model.vae_gib + load_figures().video.runtime_gib
    low = max(model.text_encoder_gib, model.weights_gib + step, tiled)
    return always + model.text_encoder_gib + model.weights_gib + max(step, whole), always + low
