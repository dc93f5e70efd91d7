"""Models of diffusers whose step is timed: published sizes, random weights (speed does not depend on the values).

A new model is one row of MODELS, and a function that makes what its forward takes where no other model takes the same.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from .. import cogvideox

Inputs = dict[str, Any]
PROMPT = 60
"""Text tokens of a prompt, where a mask hides the others."""


@dataclass(frozen=True)
class StepModel:
    """One model at one size.

    kind: diffusers' class. config: what differs from that class's defaults. latents: frames, height, width of what one step
    denoises (Flux and LTX: of their tokens). inputs(config, latents, batch): what forward takes, float tensors in float32.
    dispatches: its attention goes through diffusers' dispatcher, so it takes a backend of that; else it is hooked.
    text: how many text tokens a mask leaves of those that attend together with the video's; None where no mask does.
    tiny, tiny_latents: the same for a dry run.
    """

    kind: str
    latents: tuple[int, int, int]
    inputs: Callable[[Any, tuple[int, int, int], int], Inputs]
    tiny: Mapping[str, Any]
    tiny_latents: tuple[int, int, int] = (3, 8, 8)
    config: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    dispatches: bool = True
    text: int | None = None

    def make(self, device: str, dtype: torch.dtype, tiny: bool = False) -> tuple[Any, Inputs]:
        """(model, what its forward takes), always the same values for a device.

        The weights are made on the device in their own dtype, as `from_pretrained(torch_dtype=...)` has them: what diffusers
        keeps in float32 of a class stays so.
        """
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(diffusers, self.kind)(**(self.tiny if tiny else self.config)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        for name, parameter in model.named_parameters():
            if any(kept in name.split(".") for kept in model._keep_in_fp32_modules or ()):
                parameter.data = parameter.data.float()
        with torch.device(device):
            given = self.inputs(model.config, self.tiny_latents if tiny else self.latents, self.batch)
        return model, {name: _cast(value, dtype) for name, value in given.items()}

    @property
    def fuses(self) -> bool:
        """Whether its attention's frame leaves norms and positions to processors, which may fuse them with quantisation."""
        return self.kind == diffusers.CogVideoXTransformer3DModel.__name__

    def leading_text(self, tiny: bool = False) -> int:
        """Text tokens that stand before the video's in its attention; 0 where none do."""
        takes = inspect.signature(getattr(diffusers, self.kind).__init__).parameters
        name = "max_text_seq_length"  # CogVideoX's
        return (self.tiny if tiny else self.config).get(name, takes[name].default) if name in takes else 0

    def tokens(self, config: Any, tiny: bool = False) -> int:
        """Video (or image) tokens of one sample."""
        patch = config.patch_size
        if isinstance(patch, int):
            patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
        return math.prod(-(-size // side) for size, side in zip(self.tiny_latents if tiny else self.latents, patch))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Float tensors but angles of positions (tuples), in the model's dtype."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _cogvideox(config: Any, latents: tuple[int, int, int], batch: int) -> Inputs:
    frames, height, width = latents
    given = dict(hidden_states=torch.randn(batch, frames, config.in_channels, height, width),
                 encoder_hidden_states=torch.randn(batch, config.max_text_seq_length, config.text_embed_dim),
                 timestep=torch.full((batch,), 500))
    if config.use_rotary_positional_embeddings:
        tokens = -(-frames // (config.patch_size_t or 1)) * (height // config.patch_size) * (width // config.patch_size)
        angles = torch.rand(tokens, config.attention_head_dim // 2).mul(6.28).repeat_interleave(2, 1)
        given["image_rotary_emb"] = (angles.cos(), angles.sin())
    return given


def _mochi(config: Any, latents: tuple[int, int, int], batch: int) -> Inputs:
    """A prompt of 60 tokens, padded; the empty one beside it has 1."""
    tokens = config.max_sequence_length
    kept = torch.tensor([1, min(PROMPT, tokens)])[:batch, None]
    return dict(hidden_states=torch.randn(batch, config.in_channels, *latents), timestep=torch.full((batch,), 500),
                encoder_hidden_states=torch.randn(batch, tokens, config.text_embed_dim),
                encoder_attention_mask=(torch.arange(tokens) < kept).long())


def _wan(config: Any, latents: tuple[int, int, int], batch: int) -> Inputs:
    return dict(hidden_states=torch.randn(batch, config.in_channels, *latents), timestep=torch.full((batch,), 500),
                encoder_hidden_states=torch.randn(batch, 512, config.text_dim))


def _hunyuan(config: Any, latents: tuple[int, int, int], batch: int) -> Inputs:
    tokens = 256
    return dict(hidden_states=torch.randn(batch, config.in_channels, *latents), timestep=torch.full((batch,), 500),
                encoder_hidden_states=torch.randn(batch, tokens, config.text_embed_dim),
                encoder_attention_mask=(torch.arange(tokens) < PROMPT).long().expand(batch, tokens),
                pooled_projections=torch.randn(batch, config.pooled_projection_dim), guidance=torch.full((batch,), 6000.0))


def _ltx(config: Any, latents: tuple[int, int, int], batch: int) -> Inputs:
    frames, height, width = latents
    return dict(hidden_states=torch.randn(batch, math.prod(latents), config.in_channels), timestep=torch.full((batch,), 500),
                encoder_hidden_states=torch.randn(batch, 128, config.caption_channels),
                encoder_attention_mask=(torch.arange(128) < PROMPT).long().expand(batch, 128),
                num_frames=frames, height=height, width=width)


def _flux(config: Any, latents: tuple[int, int, int], batch: int) -> Inputs:
    _, height, width = latents
    rows, columns = torch.arange(float(height)), torch.arange(float(width))
    return dict(hidden_states=torch.randn(batch, height * width, config.in_channels), timestep=torch.full((batch,), 0.5),
                encoder_hidden_states=torch.randn(batch, 512, config.joint_attention_dim),
                pooled_projections=torch.randn(batch, config.pooled_projection_dim),
                img_ids=torch.cartesian_prod(torch.zeros(1), rows, columns), txt_ids=torch.zeros(512, 3),
                guidance=torch.full((batch,), 3.5))


_COGVIDEOX = dict(kind="CogVideoXTransformer3DModel", inputs=_cogvideox, batch=2, dispatches=False, tiny=cogvideox.TINY)
_WAN = dict(kind="WanTransformer3DModel", inputs=_wan, latents=(21, 60, 104), tiny_latents=(3, 16, 16),
            tiny=dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=64, num_layers=1, in_channels=4, out_channels=4,
                      text_dim=32, freq_dim=32))
_WAN_14B = dict(**_WAN, config=dict(num_attention_heads=40, ffn_dim=13824, num_layers=40, cross_attn_norm=True))
_HUNYUAN = dict(kind="HunyuanVideoTransformer3DModel", inputs=_hunyuan, text=PROMPT, config=dict(guidance_embeds=True),
                tiny=dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1,
                          num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=16,
                          rope_axes_dim=(16, 24, 24), guidance_embeds=True))

MODELS: dict[str, StepModel] = {
    **{f"cogvideox-{size}": StepModel(**_COGVIDEOX, latents=cogvideox.LATENTS[size], config=config)
       for size, config in cogvideox.CONFIGS.items()},
    "mochi": StepModel("MochiTransformer3DModel", (15, 60, 106), _mochi, batch=2, dispatches=False, tiny_latents=(2, 8, 8),
                       tiny=dict(num_attention_heads=2, attention_head_dim=32, num_layers=2, pooled_projection_dim=16,
                                 in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=8)),
    "wan2.1-1.3b": StepModel(**_WAN, config=dict(num_attention_heads=12, ffn_dim=8960, num_layers=30, cross_attn_norm=True)),
    "wan2.1-14b": StepModel(**_WAN_14B),
    "wan2.1-14b-720p": StepModel(**_WAN_14B | dict(latents=(21, 90, 160))),
    "hunyuanvideo": StepModel(**_HUNYUAN, latents=(16, 68, 120)),
    "hunyuanvideo-720p": StepModel(**_HUNYUAN, latents=(33, 90, 160)),
    "ltx": StepModel("LTXVideoTransformer3DModel", (21, 16, 22), _ltx, batch=2,
                     tiny=dict(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64,
                               cross_attention_dim=128, num_layers=2, caption_channels=32)),
    "flux": StepModel("FluxTransformer2DModel", (1, 64, 64), _flux, config=dict(guidance_embeds=True), tiny_latents=(1, 8, 8),
                      tiny=dict(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
                                joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(16, 24, 24),
                                guidance_embeds=True)),
}
"""By the name that `bench step --models` takes. Sizes: CogVideoX 49 frames of 480x720 (1.5: 81 of 768x1360), Mochi 85 of
480x848, Wan 81 of 480x832 (-720p: 720x1280), HunyuanVideo 61 of 544x960 (-720p: 129 of 720x1280), LTX 161 of 512x704, Flux
1024x1024. A batch of 2 where the pipeline runs the guided and the unguided sample in one call."""
