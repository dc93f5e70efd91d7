"""CogVideoX's sizes, for whichever framework's transformer is built of them."""
from __future__ import annotations

from typing import Any

_5B = dict(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True)

CONFIGS: dict[str, dict[str, Any]] = {
    "2b": dict(num_layers=30),
    "5b": _5B,
    "1.5-5b": dict(**_5B, patch_size_t=2, sample_height=300, sample_width=300, sample_frames=81, patch_bias=False),
}
"""What differs from the class's defaults, by model."""
LATENTS = {"2b": (13, 60, 90), "5b": (13, 60, 90), "1.5-5b": (22, 96, 170)}
"""Frames, height and width of the latents: 17550, 17550 and 44880 video tokens."""
TINY: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=16,
                            text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
                            max_text_seq_length=6, use_rotary_positional_embeddings=True)
"""A transformer for a dry run."""
TINY_LATENTS = (3, 8, 8)
