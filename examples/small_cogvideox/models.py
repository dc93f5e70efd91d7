"""The small CogVideoX in its two configurations: sizes, building, saving in diffusers' layout, loading."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tokens import MAX_TOKENS, Tokens, build_vocabulary
from torch import nn
from transformers import T5Config, T5EncoderModel

from lowbit_video.eval import world as worlds
from lowbit_video.files import write_json
from lowbit_video.pipelines.shared.generation import GENERATION_NAME

SHARD_SIZE = "15MB"


@dataclass(frozen=True)
class Sizes:
    """Everything that decides how large the model and its clips are."""

    height: int = 128
    width: int = 192
    frames: int = 33
    vae_channels: tuple[int, ...] = (16, 32, 64, 128)
    vae_groups: int = 8
    latent_channels: int = 16
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    time_dim: int = 128
    text_dim: int = 256
    text_layers: int = 3
    text_heads: int = 4
    text_ff: int = 512
    snr_shift: float = 3.0
    world: str = "shapes"
    rotary: bool = False  # positions of video tokens by rotation in every attention, as the 5b model, not added at the start
    text_tokens: int = MAX_TOKENS

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Of one clip, as the transformer takes it: [frames, channels, height, width]."""
        return self.latent_frames, self.latent_channels, self.height // 8, self.width // 8

    @property
    def of_world(self) -> worlds.World:
        return worlds.WORLDS[self.world]

    def tokens(self, frames: int, shrink: int = 1) -> int:
        """Text and video tokens of `frames` latent frames, height and width divided by `shrink`."""
        return self.text_tokens + frames * (self.height // 16 // shrink) * (self.width // 16 // shrink)


SIZES = Sizes()
LONG = Sizes(height=384, width=512, frames=49, heads=6, world="scenes", rotary=True, text_tokens=64)
# For a quick look that everything runs; too small to learn.
TINY = Sizes(height=32, width=48, frames=17, vae_channels=(8, 8, 8, 16), vae_groups=4, latent_channels=4, layers=2, heads=2,
             head_dim=32, time_dim=32, text_dim=32, text_layers=1, text_heads=2, text_ff=64)
TINY_LONG = replace(TINY, height=96, width=128, world="scenes", rotary=True, text_tokens=64)
CONFIGURATIONS = {"small": (SIZES, TINY), "long": (LONG, TINY_LONG)}  # name -> sizes, toy sizes


def build_vae(sizes: Sizes) -> AutoencoderKLCogVideoX:
    """An untrained autoencoder: little noise on its latents, and norms that let the signal through, to learn fast."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=sizes.vae_channels, latent_channels=sizes.latent_channels, layers_per_block=1,
        norm_num_groups=sizes.vae_groups, sample_height=sizes.height, sample_width=sizes.width, scaling_factor=1.0)
    nn.init.constant_(vae.encoder.conv_out.conv.bias[sizes.latent_channels:], -5.0)  # log variance
    for name, module in vae.decoder.named_modules():
        if name.endswith("conv_y"):
            nn.init.ones_(module.conv.bias)
    return vae


def build_text_encoder(sizes: Sizes, vocabulary: int) -> T5EncoderModel:
    """An untrained encoder whose heads already prefer some distances: which word belongs to which is learned sooner."""
    encoder = T5EncoderModel(T5Config(
        vocab_size=vocabulary, d_model=sizes.text_dim, d_kv=sizes.text_dim // sizes.text_heads, d_ff=sizes.text_ff,
        num_layers=sizes.text_layers, num_heads=sizes.text_heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0))
    nn.init.normal_(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return encoder


def build_transformer(sizes: Sizes) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=sizes.heads, attention_head_dim=sizes.head_dim, in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels, time_embed_dim=sizes.time_dim, text_embed_dim=sizes.text_dim,
        num_layers=sizes.layers, sample_width=sizes.width // 8, sample_height=sizes.height // 8, sample_frames=sizes.frames,
        max_text_seq_length=sizes.text_tokens, spatial_interpolation_scale=1.0, temporal_interpolation_scale=1.0,
        use_rotary_positional_embeddings=sizes.rotary)


def build_scheduler(sizes: Sizes) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
        snr_shift_scale=sizes.snr_shift)


class TextToVelocity(nn.Module):
    """Text encoder and transformer as one module, so that one optimiser trains both."""

    def __init__(self, text_encoder: T5EncoderModel, transformer: CogVideoXTransformer3DModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, ids: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """ids `[B, L]`, noisy latents `[B, F, C, H, W]`, timestep `[B]` -> velocity `[B, F, C, H, W]`."""
        text = self.text_encoder(ids)[0]
        return self.transformer(noisy, text, timestep, return_dict=False)[0]


def initialise(model: TextToVelocity) -> None:
    """Gates and output start at zero, as diffusion transformers usually do: every block begins as the identity."""
    for block in model.transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for layer in (model.transformer.norm_out.linear, model.transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def rescale_latents(vae: AutoencoderKLCogVideoX, std: torch.Tensor) -> None:
    """Divide each latent channel by `std` `[C]` inside the weights: same reconstructions, latents of unit spread."""
    scale = (1.0 / std).to(vae.encoder.conv_out.conv.weight)
    count = len(scale)
    out = vae.encoder.conv_out.conv
    out.weight[:count] *= scale[:, None, None, None, None]
    out.bias[:count] *= scale
    out.bias[count:] += 2 * scale.log()
    readers = [vae.decoder.conv_in.conv] + [
        conv.conv for name, conv in vae.decoder.named_modules() if name.endswith(("conv_y", "conv_b"))]
    for conv in readers:
        conv.weight /= scale[None, :, None, None, None]


def save(folder: str | Path, vae, text_encoder, transformer, sizes: Sizes, generation: dict) -> None:
    """Write a folder as diffusers publishes them, fp16, shards under 16 MB, and `generation.json` beside.

    The transformer's weights are rounded to values that bfloat16 has too: runs in both types then compute with the same
    weights, and the files pack a sixth smaller. The tokenizer stands as `spiece.model` with its config, as in the published
    CogVideoX folders."""
    folder = Path(folder)
    half = [module.half() for module in (vae, text_encoder, transformer.bfloat16())]
    half[0].save_pretrained(folder / "vae", max_shard_size=SHARD_SIZE)
    half[1].save_pretrained(folder / "text_encoder", max_shard_size=SHARD_SIZE)
    half[2].save_pretrained(folder / "transformer", max_shard_size=SHARD_SIZE)
    for name in ("vae", "transformer"):  # where a module was once loaded from is nobody's business
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    build_scheduler(sizes).save_pretrained(folder / "scheduler")
    if not (folder / "tokenizer" / "spiece.model").exists():
        build_vocabulary(folder / "tokenizer", sizes.of_world, sizes.text_tokens)
    index = {
        "_class_name": "CogVideoXPipeline", "_diffusers_version": "0.42.0",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"], "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"], "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_generation(folder, generation)


def write_generation(folder: str | Path, generation: dict) -> None:
    """What the demo uses unless told otherwise: steps, guidance, clip size, rate."""
    write_json(Path(folder) / GENERATION_NAME, generation, indent=2)


def generation_defaults(sizes: Sizes) -> dict:
    return {"num_inference_steps": 25, "guidance_scale": 4.0, "num_frames": sizes.frames, "height": sizes.height,
            "width": sizes.width, "fps": sizes.of_world.fps, "max_sequence_length": sizes.text_tokens, "world": sizes.world}


def load_pipeline(folder: str | Path, device, dtype=torch.float32) -> CogVideoXPipeline:
    pipe = CogVideoXPipeline.from_pretrained(str(folder), torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def describe(sizes: Sizes) -> dict:
    return asdict(sizes)


__all__ = ["CONFIGURATIONS", "LONG", "MAX_TOKENS", "SIZES", "TINY", "TINY_LONG", "Sizes", "TextToVelocity", "Tokens",
           "build_scheduler", "build_text_encoder", "build_transformer", "build_vae", "build_vocabulary", "describe",
           "generation_defaults", "initialise", "load_pipeline", "rescale_latents", "save", "write_generation"]
