"""The frame of the plain attention module of diffusers and ppdiffusers: one stream of tokens, attending to itself or to text.

Source: ppdiffusers 0.29.0, models/attention_processor.py, AttnProcessor (behaviour; own code). What differs: an argument
that it would ignore is refused.
"""
from __future__ import annotations

from typing import Any


def one_stream_attention(processor: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None,
                         attention_mask: Any = None, *, temb: Any = None, scale: float = 1.0) -> Any:
    """Self attention, or cross attention where there are encoder_hidden_states.

    attn: the module; has heads, scale, to_q, to_k, to_v, to_out; norm_cross, group_norm and spatial_norm (None where it has
        none); residual_connection, rescale_output_factor.
    hidden_states: tokens [B, N, C], or an image [B, C, height, width]. encoder_hidden_states: None or tokens [B, M, C'].
    attention_mask: None, additive (float) or True-means-attend (bool), of shape [B, M], [B or B H, N or 1, M] or [B, H, N, M],
        where M is N in self attention.
    temb: for a module with a spatial norm. scale: of LoRA layers, where the projections have them.
    returns: shaped as hidden_states.
    """
    permute = attn.attention_slot.runtime.permute
    linear = lambda layer, x: layer(x, scale) if hasattr(layer, "lora_layer") else layer(x)
    tokens = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
    image = tokens.shape if len(tokens.shape) == 4 else None
    if image is not None:
        tokens = permute(tokens.reshape([image[0], image[1], -1]), [0, 2, 1])
    if attn.group_norm is not None:
        tokens = permute(attn.group_norm(permute(tokens, [0, 2, 1])), [0, 2, 1])
    keys = tokens if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross is not None:
        keys = attn.norm_encoder_hidden_states(keys)
    batch, heads = tokens.shape[0], attn.heads
    q, k, v = (linear(layer, x).reshape([batch, x.shape[1], heads, -1])
               for layer, x in ((attn.to_q, tokens), (attn.to_k, keys), (attn.to_v, keys)))
    own_scale = attn.scale * q.shape[-1] ** 0.5
    if abs(own_scale - 1) > 1e-6:
        q = q * own_scale
    out = processor.attention_of(attn, q, k, v, _by_sample(attention_mask, batch, heads))
    out = attn.to_out[1](linear(attn.to_out[0], out.reshape([batch, tokens.shape[1], -1])))
    if image is not None:
        out = permute(out, [0, 2, 1]).reshape(image)
    if attn.residual_connection:
        out = out + hidden_states
    return out / attn.rescale_output_factor


def _by_sample(mask: Any, batch: int, heads: int) -> Any:
    """The mask; one of [B H, N, M] as [B, H, N, M]."""
    if mask is None or len(mask.shape) != 3 or mask.shape[0] != batch * heads or heads == 1:
        return mask
    return mask.reshape([batch, heads, *mask.shape[1:]])
