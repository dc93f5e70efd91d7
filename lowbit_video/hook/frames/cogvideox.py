"""CogVideoX's frame: joint attention of text and video tokens, QK norm, rotary positions on the video tokens."""
from __future__ import annotations

import functools
from typing import Any

from lowbit_video.kernels.prologue.steps import Rest

from ...runtime.protocol import Runtime
from ..prologue import steps_of
from .rotary import rotated


def joint_attention(processor: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any = None,
                    image_rotary_emb: Any = None) -> tuple[Any, Any]:
    """Joint attention of text and video tokens.

    attn: the module; has heads, to_q, to_k, to_v, norm_q, norm_k (may be None), to_out.
    hidden_states: video tokens [B, N_video, C]. encoder_hidden_states: text tokens [B, N_text, C].
    attention_mask: None, or additive (float) or True-means-attend (bool), of shape [B, N], [B, N, N]
        or [B, H or 1, N or 1, N] with N = N_text + N_video, text first.
    image_rotary_emb: None or (cos, sin), each [N_video, D], for the video tokens.
    returns: video tokens and text tokens, in this order, shaped like the inputs.
    Raises ValueError without text tokens.
    """
    if encoder_hidden_states is None:
        raise ValueError("joint attention of text and video was called without encoder_hidden_states; give the text's tokens")
    runtime = attn.attention_slot.runtime
    text_tokens = encoder_hidden_states.shape[1]
    if processor.takes_pieces(attn, attention_mask, hidden_states):
        (q, k, v), rest = _projected(attn, encoder_hidden_states), Rest(*_projected(attn, hidden_states))
    else:
        (q, k, v), rest = _projected(attn, runtime.concat([encoder_hidden_states, hidden_states], 1)), None
    out = processor.attention_behind(
        attn, q, k, v, attention_mask, functools.partial(_prepared, runtime, attn, image_rotary_emb, text_tokens),
        functools.partial(steps_of, runtime, (attn.norm_q, attn.norm_k), q, image_rotary_emb, text_tokens), rest)
    out = attn.to_out[0](out.reshape([out.shape[0], out.shape[1], -1]))
    out = attn.to_out[1](out)
    text, video = runtime.cut(out, text_tokens, 1)
    return video, text


def _projected(attn: Any, tokens: Any) -> tuple[Any, Any, Any]:
    """q, k and v [B, N, H, D] of tokens [B, N, C]."""
    shape = [tokens.shape[0], tokens.shape[1], attn.heads, -1]
    return attn.to_q(tokens).reshape(shape), attn.to_k(tokens).reshape(shape), attn.to_v(tokens).reshape(shape)


def _prepared(runtime: Runtime, attn: Any, rotary: tuple[Any, Any] | None, text_tokens: int, q: Any, k: Any) -> tuple[Any, Any]:
    """q and k [B, N, H, D] normed, their video tokens rotated."""
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    if rotary is not None:
        q = _rotate_video(runtime, q, text_tokens, rotary)
        k = _rotate_video(runtime, k, text_tokens, rotary)
    return q, k


def _rotate_video(runtime: Runtime, x: Any, text_tokens: int, rotary: tuple[Any, Any]) -> Any:
    """x [B, N, H, D] with its video tokens rotated; the text tokens, which come first, stay."""
    text, video = runtime.cut(x, text_tokens, 1)
    return runtime.concat([text, rotated(runtime, video, rotary)], 1)
