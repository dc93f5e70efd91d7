"""The sizes of a model that its cost follows from: the published ones, or those of a folder's configuration."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import read_json

GIB = 2**30
T5_XXL_GIB = 8.87
"""The text encoder's 4.76 billion weights in 16 bit."""
VAE_GIB = 0.40


@dataclass(frozen=True)
class Model:
    """A CogVideoX-style model.

    layers, heads, head_dim, text_tokens, patch, patch_t, channels (of the latents): of the transformer. frames, height,
    width: of its default video, pixels. text_width, time_width: of what it is told. temporal, spatial: frames and pixels of
    a latent. vae_gib, text_encoder_gib: their weights.
    """

    name: str
    layers: int
    heads: int
    frames: int
    height: int
    width: int
    head_dim: int = 64
    text_tokens: int = 226
    patch: int = 2
    patch_t: int = 1
    channels: int = 16
    text_width: int = 4096
    time_width: int = 512
    temporal: int = 4
    spatial: int = 8
    vae_gib: float = VAE_GIB
    text_encoder_gib: float = T5_XXL_GIB

    @property
    def width_of_token(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def weights_gib(self) -> float:
        """The transformer's matrices in 16 bit: 12 squares of the width a layer, and its two modulations."""
        width = self.width_of_token
        layer = 12 * width * width + 2 * 6 * width * self.time_width
        ends = width * (self.text_width + 2 * self.token_values) + 2 * width * self.time_width
        return 2 * (self.layers * layer + ends) / GIB

    @property
    def token_values(self) -> int:
        """Values of the latents that one video token stands for."""
        return self.channels * self.patch**2 * self.patch_t

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video, as many as the temporal patch needs."""
        latent = (frames - 1) // self.temporal + 1
        return -(-latent // self.patch_t) * self.patch_t

    def video_tokens(self, frames: int, height: int, width: int) -> int:
        """Video tokens of a size. Raises ValueError where height or width is not a multiple of a token's pixels."""
        pixels = self.spatial * self.patch
        if frames < 1 or height < 1 or width < 1 or height % pixels or width % pixels:
            raise ValueError(f"{frames} frames of {height}x{width}: {self.name} needs at least one frame, and a height and a "
                             f"width that are multiples of {pixels}")
        return self.latent_frames(frames) // self.patch_t * (height // pixels) * (width // pixels)


MODELS = {model.name: model for model in (
    Model("CogVideoX-2b", layers=30, heads=30, frames=49, height=480, width=720),
    Model("CogVideoX-5b", layers=42, heads=48, frames=49, height=480, width=720),
    Model("CogVideoX-1.5-5b", layers=42, heads=48, frames=81, height=768, width=1360, patch_t=2),
)}
"""The published models by name."""

UNSAID_SIZE = (300, 300)
"""Latents that the configurations of CogVideoX 1.5 name, the largest of many sizes: their videos are published at another."""


def default_size(config: Mapping[str, Any], spatial: int) -> tuple[int, int]:
    """(height, width) in pixels of a transformer's default video. spatial: pixels of a latent."""
    if (config["sample_height"], config["sample_width"]) == UNSAID_SIZE and config.get("patch_size_t"):
        published = MODELS["CogVideoX-1.5-5b"]
        return published.height, published.width
    return config["sample_height"] * spatial, config["sample_width"] * spatial


def find_model(name: str) -> Model:
    """A published model by name, or the model of a folder in diffusers' layout.

    Raises ValueError where there is neither, or the folder's configuration lacks a size.
    """
    known = {key.lower(): model for key, model in MODELS.items()}
    short = name.lower().rpartition("/")[2]
    if short in known:
        return known[short]
    if not Path(name, "transformer", "config.json").is_file():
        raise ValueError(f"unknown model {name!r}; there are: {', '.join(MODELS)}, or a folder with transformer/config.json")
    return _model_of(Path(name))


def _model_of(folder: Path) -> Model:
    path = folder / "transformer" / "config.json"
    config = {"attention_head_dim": 64, "patch_size": 2, "max_text_seq_length": 226, "text_embed_dim": 4096,
              "time_embed_dim": 512, "temporal_compression_ratio": 4, **read_json(path)}
    needed = ("num_layers", "num_attention_heads", "in_channels", "sample_frames", "sample_height", "sample_width")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}; a CogVideoX transformer's configuration is expected")
    vae = folder / "vae" / "config.json"
    blocks = read_json(vae).get("block_out_channels", [0] * 4) if vae.is_file() else [0] * 4
    spatial = 2 ** (len(blocks) - 1)
    return Model(
        str(folder), config["num_layers"], config["num_attention_heads"], config["sample_frames"],
        *default_size(config, spatial), config["attention_head_dim"],
        config["max_text_seq_length"], config["patch_size"], config.get("patch_size_t") or 1, config["in_channels"],
        config["text_embed_dim"], config["time_embed_dim"], config["temporal_compression_ratio"], spatial,
        _files_gib(folder / "vae"), _files_gib(folder / "text_encoder"))


def _files_gib(folder: Path) -> float:
    """The weight files of a part, as large as they are stored; 0 where there are none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GIB
