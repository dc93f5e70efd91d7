"""CogVideoX's frame: joint attention of text and video tokens, QK norm, rotary positions on the video tokens."""
from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError
from ...runtime.protocol import Runtime


def joint_attention(processor: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any = None,
                    image_rotary_emb: Any = None, **others: Any) -> tuple[Any, Any]:
    """Joint attention of text and video tokens.

    attn: the module; has heads, to_q, to_k, to_v, norm_q, norm_k (may be None), to_out.
    hidden_states: video tokens [B, N_video, C]. encoder_hidden_states: text tokens [B, N_text, C].
    attention_mask: None, or additive (float) or True-means-attend (bool), of shape [B, N], [B, N, N]
        or [B, H or 1, N or 1, N] with N = N_text + N_video, text first.
    image_rotary_emb: None or (cos, sin), each [N_video, D], for the video tokens.
    returns: video tokens and text tokens, in this order, shaped like the inputs.
    Raises UnsupportedError for an argument that this protocol does not have.
    """
    if others or encoder_hidden_states is None:
        what = f"{', '.join(others)} given" if others else "encoder_hidden_states is missing"
        raise UnsupportedError(f"{what}, and a block of CogVideoX's protocol calls its attention with (hidden_states, "
                               "encoder_hidden_states, attention_mask, image_rotary_emb); if this module's block has another "
                               'protocol, declare it: lowbit_video.declare_attention(TheBlock, frame="own")')
    runtime = attn.attention_slot.runtime
    text_tokens = encoder_hidden_states.shape[1]
    joint = runtime.concat([encoder_hidden_states, hidden_states], 1)
    batch, tokens = joint.shape[0], joint.shape[1]
    q = attn.to_q(joint).reshape([batch, tokens, attn.heads, -1])
    k = attn.to_k(joint).reshape([batch, tokens, attn.heads, -1])
    v = attn.to_v(joint).reshape([batch, tokens, attn.heads, -1])
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    if image_rotary_emb is not None:
        q = _rotate_video(runtime, q, text_tokens, image_rotary_emb)
        k = _rotate_video(runtime, k, text_tokens, image_rotary_emb)
    out = processor.attention_of(attn, q, k, v, attention_mask)
    out = attn.to_out[0](out.reshape([batch, tokens, -1]))
    out = attn.to_out[1](out)
    return out[:, text_tokens:], out[:, :text_tokens]


def _rotate_video(runtime: Runtime, x: Any, text_tokens: int, rotary: tuple[Any, Any]) -> Any:
    """Rotary embedding of the video tokens of x [B, N, H, D]; the text tokens stay.

    Pairs are interleaved: (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin), in float32.
    """
    cos, sin = rotary
    text, video = x[:, :text_tokens], x[:, text_tokens:]
    wide = video.float()
    pairs = wide.reshape([*wide.shape[:3], -1, 2])
    turned = runtime.concat([-pairs[..., 1:], pairs[..., :1]], -1).reshape(wide.shape)
    rotated = wide * cos.reshape([1, cos.shape[0], 1, cos.shape[1]]) + turned * sin.reshape([1, sin.shape[0], 1, sin.shape[1]])
    return runtime.concat([text, rotated.to(x.dtype)], 1)
