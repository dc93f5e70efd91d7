"""How the VAE decodes where memory is short: videos one by one, and each by tiles, where the whole does not fit."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from lowbit_video.distributed.cost.memory import decode_bytes

from .vae import AutoencoderKLCogVideoX

SHARE = 0.8
"""Of what is free that decoding's own tensors may take; the rest is for what libraries take while they convolve."""


@contextlib.contextmanager
def within(vae: AutoencoderKLCogVideoX, latents: Sequence[int], bytes_a_value: int, free: int | None) -> Iterator[None]:
    """Decoding inside the block slices and tiles if it must. A switch that was set, on or off, stays as it is.

    latents: shape [B, f, C, h, w]. free: bytes of the device; None, where nobody knows, changes nothing.
    """
    before = vae.use_slicing, vae.use_tiling
    if free is not None:
        batch, frames, _, height, width = latents
        ratio, config = vae.spatial_compression_ratio, vae.config
        one = decode_bytes(1, frames, height * ratio, width * ratio, bytes_a_value, int(config.temporal_compression_ratio),
                           config.block_out_channels, config.layers_per_block)
        if not vae.slicing_chosen and batch * one > SHARE * free:
            vae.use_slicing = True
        if not vae.tiling_chosen and (1 if vae.use_slicing else batch) * one > SHARE * free:
            vae.use_tiling = True
    try:
        yield
    finally:
        vae.use_slicing, vae.use_tiling = before
