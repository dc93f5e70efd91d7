"""The frame of blocks with two streams, the sample's tokens first and the text's last: Stable Diffusion 3, HunyuanVideo.

Source: PaddleMIX, ppdiffusers/models, JointAttnProcessor2_5 and HunyuanVideoAttnProcessor2_0 (behaviour; own code).
"""
from __future__ import annotations

import functools
import inspect
from typing import Any

from .rotary import rotated


def two_stream_attention(processor: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None,
                         attention_mask: Any = None, *, image_rotary_emb: Any = None) -> tuple[Any, Any]:
    """Joint attention of sample and text, whose tokens have projections of their own (add_q_proj, ...) or share the sample's.

    attn: the module; has heads, to_q, to_k, to_v; to_out, if it projects its output; where text has projections of its own,
        add_q_proj, add_k_proj, add_v_proj, and to_add_out unless the block drops its text; norm_q, norm_k, norm_added_q,
        norm_added_k, each over a head, may be None or missing.
    hidden_states: sample tokens [B, N, C]. encoder_hidden_states: text tokens [B, M, C].
    attention_mask: as `cogvideox.joint_attention`, but text last.
    image_rotary_emb: None or (cos, sin), each [N, D], for the sample tokens.
    returns: sample tokens and text tokens.
    Raises ValueError without text tokens, and for what are no tokens.
    """
    if encoder_hidden_states is None:
        raise ValueError("joint attention of two streams was called without encoder_hidden_states; give the text's tokens")
    for name, stream in (("hidden_states", hidden_states), ("encoder_hidden_states", encoder_hidden_states)):
        if len(stream.shape) != 3:
            raise ValueError(f"joint attention of two streams takes tokens [B, N, C]; {name} is {list(stream.shape)}: flatten "
                             "an image's height and width to tokens, before its channels")
    runtime = attn.attention_slot.runtime
    own = getattr(attn, "add_q_proj", None) is not None
    tokens, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
    first = hidden_states if own else runtime.concat([hidden_states, encoder_hidden_states], 1)
    q, k, v = (_heads(attn, projection, norm, first)
               for projection, norm in (("to_q", "norm_q"), ("to_k", "norm_k"), ("to_v", None)))
    if image_rotary_emb is not None:
        q, k = (rotated(runtime, x, image_rotary_emb) if own else
                runtime.concat([rotated(runtime, x[:, :tokens], image_rotary_emb), x[:, tokens:]], 1) for x in (q, k))
    if own:
        added = (("add_q_proj", "norm_added_q"), ("add_k_proj", "norm_added_k"), ("add_v_proj", None))
        q, k, v = (runtime.concat([x, _heads(attn, projection, norm, encoder_hidden_states)], 1)
                   for x, (projection, norm) in zip((q, k, v), added))
    out = processor.attention_of(attn, q, k, v, attention_mask).reshape([hidden_states.shape[0], tokens + text, -1])
    sample, context = out[:, :tokens], out[:, tokens:]
    if getattr(attn, "to_out", None) is not None:
        sample = attn.to_out[1](attn.to_out[0](sample))
    if getattr(attn, "to_add_out", None) is not None:
        context = attn.to_add_out(context)
    return sample, context


def _heads(attn: Any, projection: str, norm: str | None, x: Any) -> Any:
    """x [B, N, C] projected and normed, [B, N, H, D]."""
    x = getattr(attn, projection)(x).reshape([x.shape[0], x.shape[1], attn.heads, -1])
    layer = None if norm is None else getattr(attn, norm, None)
    if layer is None:
        return x
    return layer(x, begin_norm_axis=3) if _takes_axis(type(layer)) else layer(x)


@functools.cache
def _takes_axis(norm_class: type) -> bool:
    """Whether a norm must be told its axis: ppdiffusers' RMSNorm norms all dimensions from the third on by default."""
    return "begin_norm_axis" in inspect.signature(norm_class.forward).parameters
