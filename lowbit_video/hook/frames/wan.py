"""Wan's frame in PaddleMIX: self attention with rotary positions, or cross attention to text and, image to video, to an image.

Source: PaddleMIX, ppdiffusers/models/transformer_wan.py, WanAttnProcessor2_0 (behaviour; own code). What differs: positions are
applied in float32, there in float64.
"""
from __future__ import annotations

from typing import Any

from .rotary import rotated

IMAGE_TOKENS = 257
"""Tokens of CLIP's image embedding (16 x 16 patches and a class), which come before the text's."""


def wan_attention(processor: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
                  *, rotary_emb: Any = None) -> Any:
    """Self attention, or cross attention where there are encoder_hidden_states.

    attn: the module; has heads, to_q, to_k, to_v, to_out; norm_q and norm_k over all heads (may be None); for cross attention
        to an image add_k_proj, add_v_proj and norm_added_k, else add_k_proj is None or missing.
    hidden_states: tokens [B, N, C]. encoder_hidden_states: None or tokens [B, M, C], the image's 257 first where there are any.
    attention_mask: as `one_stream`; not for the image's keys.
    rotary_emb: None or complex numbers [1, 1, N, D / 2], the turns of the pairs.
    returns: tokens [B, N, C].
    """
    keys, image = hidden_states if encoder_hidden_states is None else encoder_hidden_states, None
    if getattr(attn, "add_k_proj", None) is not None:
        image, keys = keys[:, :IMAGE_TOKENS], keys[:, IMAGE_TOKENS:]
    by_head = lambda x: x.reshape([x.shape[0], x.shape[1], attn.heads, -1])
    normed = lambda norm, x: x if norm is None else norm(x)
    q = by_head(normed(attn.norm_q, attn.to_q(hidden_states)))
    k = by_head(normed(attn.norm_k, attn.to_k(keys)))
    v = by_head(attn.to_v(keys))
    if rotary_emb is not None:
        turns = [_twice(part) for part in (rotary_emb.real(), rotary_emb.imag())]
        q, k = (rotated(attn.attention_slot.runtime, x, turns) for x in (q, k))
    out = processor.attention_of(attn, q, k, v, attention_mask)
    if image is not None:
        k, v = normed(attn.norm_added_k, attn.add_k_proj(image)), attn.add_v_proj(image)
        out = out + processor.attention_of(attn, q, by_head(k), by_head(v))
    out = out.reshape([out.shape[0], out.shape[1], -1])
    return attn.to_out[1](attn.to_out[0](out))


def _twice(part: Any) -> Any:
    """[1, 1, N, D / 2] as float32 [N, D], each number for both halves of its pair."""
    return part.reshape(part.shape[-2:]).float().repeat_interleave(2, 1)
