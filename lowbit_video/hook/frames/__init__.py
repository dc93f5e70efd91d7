"""Frames: what a model's attention does around its attention (projections, norms, positions), one file a protocol.

A frame is `frame(processor, attn, hidden_states, encoder_hidden_states, attention_mask, **others)`, where `others` is what its
protocol has besides, by name; it gives q, k and v to `processor.attention_of(attn, q, k, v, mask)` and returns what the
model's block expects. Which one a module follows is declared by class: of the module itself, or, where a library has one
attention class for many protocols (diffusers' and ppdiffusers' `Attention`), of the block that owns it. An undeclared class is
refused: its block might mean something else by the same names.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...arguments import shown
from ...errors import UnsupportedError
from .cogvideox import joint_attention
from .one_stream import one_stream_attention
from .own import own_attention
from .owners import owner_of
from .two_streams import two_stream_attention
from .wan import wan_attention

FRAMES: dict[str, Callable] = {"cogvideox": joint_attention, "one_stream": one_stream_attention, "own": own_attention,
                               "two_streams": two_stream_attention, "wan": wan_attention}
"""The protocols there are."""

_OWN = (
    "attention.BasicTransformerBlock", "attention.JointTransformerBlock",
    "transformers.auraflow_transformer_2d.AuraFlowJointTransformerBlock",
    "transformers.auraflow_transformer_2d.AuraFlowSingleTransformerBlock",
    "transformers.transformer_allegro.AllegroTransformerBlock",
    "transformers.transformer_cogview3plus.CogView3PlusTransformerBlock",
    "transformers.transformer_cogview4.CogView4TransformerBlock",
    "transformers.transformer_easyanimate.EasyAnimateTransformerBlock",
    "transformers.transformer_hidream_image.HiDreamImageSingleTransformerBlock",
    "transformers.transformer_hidream_image.HiDreamImageTransformerBlock",
    "transformers.transformer_lumina2.Lumina2TransformerBlock", "transformers.transformer_mochi.MochiTransformerBlock",
    "transformers.transformer_omnigen.OmniGenBlock", "transformers.transformer_sd3.SD3SingleTransformerBlock",
)
"""Blocks of diffusers 0.42 that pass its dispatcher by, their processors ending in torch's own attention."""

_declared: dict[type | str, str] = {
    "lowbit_video.pipelines.cogvideox.transformer.Attention": "cogvideox",
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock": "cogvideox",
    **{f"ppdiffusers.models.{name}": frame for name, frame in {
        "attention.BasicTransformerBlock": "one_stream",
        "attention.GatedSelfAttentionDense": "one_stream",
        "attention.TemporalBasicTransformerBlock": "one_stream",
        "attention.JointTransformerBlock": "two_streams",
        "cogvideox_transformer_3d.CogVideoXBlock": "cogvideox",
        "cogvideox_transformer_3d_vctrl.CogVideoXBlock": "cogvideox",
        "transformer_hunyuan_video.HunyuanVideoIndividualTokenRefinerBlock": "one_stream",
        "transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock": "two_streams",
        "transformer_hunyuan_video.HunyuanVideoTransformerBlock": "two_streams",
        "transformer_wan.WanTransformerBlock": "wan",
    }.items()},
    "diffusers.models.transformers.consisid_transformer_3d.ConsisIDBlock": "cogvideox",
    **dict.fromkeys((f"diffusers.models.{block}" for block in _OWN), "own"),
}


def declare_attention(module_class: type, frame: str = "cogvideox") -> type:
    """Says that attention modules of a class, or those that a block of that class owns, follow a protocol.

    module_class: the attention module's class, or its block's; subclasses are meant too. frame: a name in FRAMES. "cogvideox":
        the module has heads, to_q, to_k, to_v, norm_q, norm_k and to_out, and calls its processor as
        `(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)` for (video tokens, text tokens). "own":
        the processor that the module has does the work, and its calls of torch's `scaled_dot_product_attention` are served.
        The others say in their files what they need.
    Returns the class, so that it can stand above one as a decorator.
    Raises TypeError for what is no class, ValueError for a frame that does not exist.
    """
    if not isinstance(module_class, type):
        raise TypeError(f"declare_attention takes a class, such as type(model.blocks[0].attn), not {shown(module_class)}")
    if not isinstance(frame, str) or frame not in FRAMES:
        raise ValueError(f"unknown frame {shown(frame)}; there are: {', '.join(FRAMES)}")
    _declared[module_class] = frame
    return module_class


def frame_of(attn: Any, owner: Any = None) -> Callable:
    """The frame of an attention module. owner: the block that it is a part of; looked up where it matters and is not given.

    Raises UnsupportedError for a class that is not declared, naming it and those that are.
    """
    frame = _frame_of_class(type(attn))
    if frame is None:
        owner = owner_of(attn) if owner is None else owner
        frame = None if owner is None else _frame_of_class(type(owner))
    if frame is not None:
        return frame
    within = "" if owner is None else f" in {_name(type(owner))}"
    raise UnsupportedError(
        f"the attention class {_name(type(attn))}{within} is not declared: what it computes around its attention is unknown; "
        f"declared are: {', '.join(map(_name, _declared))}; if its block follows CogVideoX's protocol, say so first: "
        "lowbit_video.declare_attention(TheClass); if its processor calls torch's scaled_dot_product_attention: "
        'lowbit_video.declare_attention(TheClass, frame="own")')


def _frame_of_class(module_class: type) -> Callable | None:
    for base in module_class.__mro__:
        name = _declared.get(base) or _declared.get(_name(base))
        if name is not None:
            return FRAMES[name]
    return None


def _name(module_class: type | str) -> str:
    return module_class if isinstance(module_class, str) else f"{module_class.__module__}.{module_class.__qualname__}"
