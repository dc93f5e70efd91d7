"""The CogVideoX transformer: joint attention over text and video tokens, modulated by the timestep.

Serves 2b (sine-cosine positions), 5b (rotary, optionally learned positions) and 1.5 (temporal patches, `ofs`).
Names of layers are those of the published weights. Every attention module calls a processor, the hook for low-bit attention.
Source: diffusers 0.42, models/transformers/cogvideox_transformer_3d.py (behaviour; own code). What differs: text and video
tokens are never joined outside attention and feed-forward, sine-cosine positions are made when needed, and a text shorter
than `max_text_seq_length` is allowed with them.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from lowbit_video.hook.base import check_processor
from lowbit_video.runtime import paddle_runtime
from lowbit_video.token_order import raster_order, token_order

from ..shared.config import MAX_EPSILON, check_between, keep_config
from ..shared.weights import Model
from .rotary import THETA, get_3d_rotary_pos_embed, get_3d_sincos_pos_embed, get_resize_crop_region_for_grid

COUNTS = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim", "text_embed_dim",
          "sample_width", "sample_height", "sample_frames", "patch_size", "patch_size_t", "temporal_compression_ratio",
          "max_text_seq_length")
MAX_COUNT = 2**20
"""Of each of a configuration's counts: far beyond any model, and no danger to memory."""

# of the LayerNorm over each head of q and k
QK_NORM_EPSILON = 1e-6
ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu, "mish": F.mish}


class Attention(nn.Layer):
    """Joint self-attention of text and video tokens; a processor does the work.

    Args:
        query_dim: channels of the tokens.
        heads, head_dim: their product is the inner width.
        bias: on to_q, to_k, to_v.
        out_bias: on to_out.
        qk_norm: LayerNorm over each head of q and k.
    """

    def __init__(
        self, query_dim: int, heads: int, head_dim: int, bias: bool = False, out_bias: bool = True, qk_norm: bool = True
    ):
        super().__init__()
        # here, because importing this module must not need the processors' own imports
        from lowbit_video.hook.processors import ExactAttnProcessor

        self.heads = heads
        self.head_dim = head_dim
        inner_dim = heads * head_dim
        self.to_q = _linear(query_dim, inner_dim, bias)
        self.to_k = _linear(query_dim, inner_dim, bias)
        self.to_v = _linear(query_dim, inner_dim, bias)
        self.norm_q = nn.LayerNorm(head_dim, QK_NORM_EPSILON) if qk_norm else None
        self.norm_k = nn.LayerNorm(head_dim, QK_NORM_EPSILON) if qk_norm else None
        self.to_out = nn.LayerList([_linear(inner_dim, query_dim, out_bias), nn.Dropout(0.0)])
        self.set_processor(ExactAttnProcessor())

    def set_processor(self, processor: Any) -> None:
        """Sets the callable `(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)`."""
        check_processor(processor)
        # not through nn.Layer, which would take a processor that is a Layer for a part of the model
        object.__setattr__(self, "processor", processor)

    def forward(self, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        """Returns (video tokens, text tokens), each shaped as its input [B, N, C]."""
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class CogVideoXPatchEmbed(nn.Layer):
    """Makes tokens of the latent video and of the text embeddings, and adds positions where the model has additive ones."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.config = config
        patch, patch_t = config["patch_size"], config["patch_size_t"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if patch_t is None:
            bias = None if config["patch_bias"] else False
            self.proj = nn.Conv2D(config["in_channels"], width, patch, stride=patch, bias_attr=bias)
        else:
            self.proj = nn.Linear(config["in_channels"] * patch * patch * patch_t, width)
        self.text_proj = nn.Linear(config["text_embed_dim"], width)
        self.learned = config["use_learned_positional_embeddings"]
        self.additive = self.learned or not config["use_rotary_positional_embeddings"]
        self.table = (None, None)
        if self.learned:
            frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
            video = self._sincos(frames, config["sample_height"], config["sample_width"])
            text = paddle.zeros([config["max_text_seq_length"], width], dtype=video.dtype)
            self.register_buffer("pos_embedding", paddle.concat([text, video], axis=0).unsqueeze(0), persistable=True)

    def _sincos(self, frames: int, height: int, width: int) -> paddle.Tensor:
        """Returns [tokens, C] for a latent video of this size."""
        patch = self.config["patch_size"]
        return get_3d_sincos_pos_embed(
            self.config["num_attention_heads"] * self.config["attention_head_dim"],
            (height // patch, width // patch),
            frames,
            self.config["spatial_interpolation_scale"],
            self.config["temporal_interpolation_scale"],
        )

    def _table(self, frames: int, height: int, width: int, dtype: paddle.dtype) -> paddle.Tensor:
        """Returns the sine-cosine table in a type; outside of tracing the last one is kept for the next step."""
        key = (frames, height, width, dtype)
        if paddle.in_dynamic_mode() and self.table[0] == key:
            return self.table[1]
        table = self._sincos(frames, height, width).astype(dtype)
        if paddle.in_dynamic_mode():
            object.__setattr__(self, "table", (key, table))
        return table

    def forward(self, encoder_hidden_states, hidden_states):
        """Returns text tokens [B, N_text, C] and video tokens [B, N_video, C].

        Args:
            encoder_hidden_states: [B, N_text, text_embed_dim].
            hidden_states: latents [B, F, C_in, H, W].
        """
        patch, patch_t = self.config["patch_size"], self.config["patch_size_t"]
        batch, frames, channels, height, width = hidden_states.shape
        text = self.text_proj(encoder_hidden_states)
        if patch_t is None:
            video = self.proj(hidden_states.reshape([batch * frames, channels, height, width]))
            video = video.flatten(2).transpose([0, 2, 1]).reshape([batch, -1, video.shape[1]])
        else:
            shape = [batch, frames // patch_t, patch_t, channels, height // patch, patch, width // patch, patch]
            video = hidden_states.reshape(shape).transpose([0, 1, 4, 6, 3, 2, 5, 7])
            video = self.proj(video.reshape([batch, -1, channels * patch_t * patch * patch]))
        if not self.additive:
            return text, video

        sample_frames = (frames - 1) * self.config["temporal_compression_ratio"] + 1
        if self.learned and sample_frames == self.config["sample_frames"]:
            table = self.pos_embedding.astype(video.dtype)
            text_length = self.config["max_text_seq_length"]
            return text + table[:, :text_length], video + table[:, text_length:]
        return text, video + self._table(frames, height, width, video.dtype)


class TimestepEmbedding(nn.Layer):
    """Two linear layers over the sine-cosine embedding of a number."""

    def __init__(self, in_channels: int, time_embed_dim: int, activation: str = "silu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"timestep_activation_fn {activation!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        """[B, in_channels] -> [B, time_embed_dim]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class CogVideoXLayerNormZero(nn.Layer):
    """LayerNorm of video and text tokens, shifted and scaled by the timestep, and the gates of what follows."""

    def __init__(self, conditioning_dim: int, width: int, affine: bool, epsilon: float):
        super().__init__()
        self.linear = nn.Linear(conditioning_dim, 6 * width)
        self.norm = _layer_norm(width, epsilon, affine)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        """Returns video tokens, text tokens, video gate and text gate (gates [B, 1, C])."""
        parts = paddle.chunk(self.linear(F.silu(temb)).reshape([0, 1, -1]), 6, axis=-1)  # 0: the batch, as it is
        shift, scale, gate, text_shift, text_scale, text_gate = parts
        hidden_states = self.norm(hidden_states) * (1 + scale) + shift
        encoder_hidden_states = self.norm(encoder_hidden_states) * (1 + text_scale) + text_shift
        return hidden_states, encoder_hidden_states, gate, text_gate


class AdaLayerNorm(nn.Layer):
    """The last LayerNorm, shifted and scaled by the timestep."""

    def __init__(self, conditioning_dim: int, width: int, affine: bool, epsilon: float):
        super().__init__()
        self.linear = nn.Linear(conditioning_dim, 2 * width)
        self.norm = _layer_norm(width, epsilon, affine)

    def forward(self, x, temb):
        """[B, N, C] -> [B, N, C]."""
        shift, scale = paddle.chunk(self.linear(F.silu(temb)).reshape([0, 1, -1]), 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class GELU(nn.Layer):
    """A linear layer and its GELU, exact or by tanh."""

    def __init__(self, in_channels: int, out_channels: int, approximate: bool):
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels)
        self.approximate = approximate

    def forward(self, x):
        """[..., in] -> [..., out]."""
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Layer):
    """Two linear layers, four times as wide between."""

    def __init__(self, width: int, activation: str, dropout: float):
        super().__init__()
        if activation not in ("gelu", "gelu-approximate"):
            raise ValueError(f"activation_fn {activation!r} is not supported; use 'gelu-approximate' or 'gelu'")
        inner = 4 * width
        self.net = nn.LayerList(
            [GELU(width, inner, activation == "gelu-approximate"), nn.Dropout(dropout), nn.Linear(inner, width)]
        )

    def forward(self, x):
        """[B, N, C] -> [B, N, C]."""
        return self.net[2](self.net[1](self.net[0](x)))


class CogVideoXBlock(nn.Layer):
    """Attention and feed-forward, each normed before and gated after."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        width = config["num_attention_heads"] * config["attention_head_dim"]
        norm = (config["time_embed_dim"], width, config["norm_elementwise_affine"], config["norm_eps"])
        self.norm1 = CogVideoXLayerNormZero(*norm)
        self.attn1 = Attention(
            width, config["num_attention_heads"], config["attention_head_dim"], bias=config["attention_bias"]
        )
        self.norm2 = CogVideoXLayerNormZero(*norm)
        self.ff = FeedForward(width, config["activation_fn"], config["dropout"])

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None):
        """Returns video tokens and text tokens, shaped as they came."""
        video, text, gate, text_gate = self.norm1(hidden_states, encoder_hidden_states, temb)
        video, text = self.attn1(video, text, image_rotary_emb=image_rotary_emb)
        hidden_states = hidden_states + gate * video
        encoder_hidden_states = encoder_hidden_states + text_gate * text

        video, text, gate, text_gate = self.norm2(hidden_states, encoder_hidden_states, temb)
        # one product over all tokens is faster than two
        joint = self.ff(paddle.concat([text, video], axis=1))
        text, video = paddle_runtime.cut(joint, text.shape[1], 1)
        hidden_states = hidden_states + gate * video
        encoder_hidden_states = encoder_hidden_states + text_gate * text
        return hidden_states, encoder_hidden_states


class CogVideoXTransformer3DModel(Model):
    """The denoiser of CogVideoX. Arguments have diffusers' names and defaults.

    Args:
        num_attention_heads, attention_head_dim: their product is the width of the model.
        in_channels, out_channels: of the latents; out_channels None means in_channels.
        flip_sin_to_cos, freq_shift: how the timestep is embedded.
        time_embed_dim: width of the timestep embedding.
        ofs_embed_dim: width of the `ofs` embedding (CogVideoX 1.5 image-to-video); None: none.
        text_embed_dim: channels of the text encoder's output.
        num_layers: blocks.
        dropout: in the feed-forward, in training only.
        attention_bias: bias on the projections of attention.
        sample_width, sample_height: of the latents that it was trained on.
        sample_frames: video frames that it was trained on (not latent frames).
        patch_size, patch_size_t: patches in space and time; patch_size_t None (CogVideoX 1.0) has none in time.
        temporal_compression_ratio: video frames to a latent frame.
        max_text_seq_length: text tokens.
        activation_fn: "gelu-approximate" or "gelu". timestep_activation_fn: "silu" and others.
        norm_elementwise_affine, norm_eps: of the LayerNorms.
        spatial_interpolation_scale, temporal_interpolation_scale: of the sine-cosine positions.
        use_rotary_positional_embeddings: rotary positions (5b, 1.5) in place of sine-cosine ones (2b).
        use_learned_positional_embeddings: learned positions as well (5b image-to-video).
        patch_bias: bias on the patch projection (CogVideoX 1.0).
    Raises:
        ValueError: a combination that no CogVideoX has.
    """

    repeated = {"num_layers": r"^transformer_blocks\.(\d+)\."}

    @keep_config
    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int | None = 16,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embed_dim: int = 512,
        ofs_embed_dim: int | None = None,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        patch_size_t: int | None = None,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        activation_fn: str = "gelu-approximate",
        timestep_activation_fn: str = "silu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
        use_learned_positional_embeddings: bool = False,
        patch_bias: bool = True,
    ):
        super().__init__()
        check_between(self.config, COUNTS, 1, MAX_COUNT)
        check_between(self.config, ("num_layers", "freq_shift"), 0, MAX_COUNT)
        check_between(self.config, ("dropout",), 0.0, 1.0)
        check_between(self.config, ("norm_eps",), 0.0, MAX_EPSILON)
        check_between(self.config, ("spatial_interpolation_scale", "temporal_interpolation_scale"), 1e-6, 1e6)
        if use_learned_positional_embeddings and not use_rotary_positional_embeddings:
            raise ValueError(
                "use_learned_positional_embeddings needs use_rotary_positional_embeddings: no CogVideoX has the one "
                "without the other"
            )
        if patch_size_t is not None and (use_learned_positional_embeddings or not use_rotary_positional_embeddings):
            raise ValueError("patch_size_t (CogVideoX 1.5) needs rotary positions and no learned ones")
        width = num_attention_heads * attention_head_dim
        self.patch_embed = CogVideoXPatchEmbed(self.config)
        self.time_embedding = TimestepEmbedding(width, time_embed_dim, timestep_activation_fn)
        self.ofs_embedding = None
        if ofs_embed_dim:
            self.ofs_embedding = TimestepEmbedding(ofs_embed_dim, ofs_embed_dim, timestep_activation_fn)
        self.transformer_blocks = nn.LayerList([CogVideoXBlock(self.config) for _ in range(num_layers)])
        self.norm_final = _layer_norm(width, norm_eps, norm_elementwise_affine)
        self.norm_out = AdaLayerNorm(time_embed_dim, width, norm_elementwise_affine, norm_eps)
        values = patch_size * patch_size * (patch_size_t or 1) * (in_channels if out_channels is None else out_channels)
        self.proj_out = nn.Linear(width, values)
        self.split: Any = None  # a TokenSplit, where several ranks share the tokens or the guidance
        self.token_order = "raster"  # one of token_order.ORDERS, in which the blocks see the video; order_tokens() sets it
        self.places: tuple = (None, None)
        self.frequencies: dict[tuple[int, str], paddle.Tensor] = {}

    def rotary_tables(self, frames: int, height: int, width: int) -> tuple[paddle.Tensor, paddle.Tensor] | None:
        """Returns `image_rotary_emb` for latents of this size; None where the model has no rotary positions.

        Args:
            frames, height, width: of the latents.
        """
        config = self.config
        if not config.use_rotary_positional_embeddings:
            return None
        patch = config.patch_size
        grid = (height // patch, width // patch)
        trained = (config.sample_height // patch, config.sample_width // patch)
        if config.patch_size_t is None:
            crop = get_resize_crop_region_for_grid(grid, trained[1], trained[0])
            return get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames)
        frames = (frames + config.patch_size_t - 1) // config.patch_size_t
        return get_3d_rotary_pos_embed(config.attention_head_dim, None, grid, frames, grid_type="slice", max_size=trained)

    def forward(
        self, hidden_states, encoder_hidden_states, timestep, timestep_cond=None, ofs=None, image_rotary_emb=None
    ):
        """Predicts from noisy latents at a timestep what the scheduler asks for.

        Args:
            hidden_states: latents [B, F, C, H, W].
            encoder_hidden_states: text embeddings [B, N_text, text_embed_dim].
            timestep: [B], integer or float; also one number for all.
            timestep_cond: must be None; no CogVideoX has it.
            ofs: [B] or [1], for a model with ofs_embed_dim.
            image_rotary_emb: (cos, sin) from `rotary_tables`, each [N_video, head_dim] float32.
        Returns:
            [B, F, out_channels, H, W], in the type of the weights.
        Raises:
            ValueError: shapes that do not divide or do not fit the configuration.
        """
        self._check(hidden_states, encoder_hidden_states, timestep_cond, ofs, image_rotary_emb)
        config = self.config
        dtype = self.proj_out.weight.dtype
        batch, frames, _, height, width = hidden_states.shape
        if self.split is not None:
            hidden_states, encoder_hidden_states, timestep, ofs = self.split.take_half(
                hidden_states, encoder_hidden_states, timestep, ofs
            )
        hidden_states = hidden_states.astype(dtype)
        encoder_hidden_states = encoder_hidden_states.astype(dtype)

        inner_dim = config.num_attention_heads * config.attention_head_dim
        temb = self.time_embedding(self._embed_number(timestep, inner_dim).astype(dtype))
        if self.ofs_embedding is not None:
            temb = temb + self.ofs_embedding(self._embed_number(ofs, config.ofs_embed_dim).astype(dtype))
        if temb.shape[0] != hidden_states.shape[0]:
            temb = temb.expand([hidden_states.shape[0], temb.shape[1]])

        patch, patch_t = config.patch_size, config.patch_size_t or 1
        grid = (frames // patch_t, height // patch, width // patch)
        encoder_hidden_states, hidden_states = self.patch_embed(encoder_hidden_states, hidden_states)
        if self.token_order != "raster":
            ordered, raster = self._places(grid, hidden_states)
            hidden_states = hidden_states.index_select(ordered, axis=1)
            if image_rotary_emb is not None:
                image_rotary_emb = tuple(table.index_select(ordered, axis=0) for table in image_rotary_emb)
        if self.split is not None:
            encoder_hidden_states, hidden_states, image_rotary_emb = self.split.take_tokens(
                encoder_hidden_states, hidden_states, image_rotary_emb
            )
        hidden_states = self.run_blocks(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        if self.split is not None:
            hidden_states = self.split.join_halves(self.split.join_tokens(hidden_states), batch)
        if self.token_order != "raster":
            hidden_states = hidden_states.index_select(raster, axis=1)

        out = hidden_states.reshape([batch, *grid, -1, patch_t, patch, patch])
        out = out.transpose([0, 1, 5, 4, 2, 6, 3, 7])
        return out.reshape([batch, frames, -1, height, width])

    def _places(self, grid: tuple[int, int, int], like: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """`token_order` and `raster_order` of the model's order where `like` is; kept for the next step as `_table` is."""
        key = (self.token_order, grid, str(like.place))
        if paddle.in_dynamic_mode() and self.places[0] == key:
            return self.places[1]
        found = token_order(self.token_order, *grid), raster_order(self.token_order, *grid)
        places = tuple(paddle.to_tensor(one, place=like.place) for one in found)
        if paddle.in_dynamic_mode():
            object.__setattr__(self, "places", (key, places))
        return places

    def run_blocks(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None):
        """Video tokens [B, N_video, C] to what is predicted of them [B, N_video, values]; what `compile` makes one graph of.

        On several ranks the tokens are this rank's: what is exchanged inside is exchanged by the attention.
        """
        for block in self.transformer_blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        return self.proj_out(self.norm_out(self.norm_final(hidden_states), temb))

    def _embed_number(self, number: Any, dim: int) -> paddle.Tensor:
        """Returns the sine-cosine embedding [B, dim] of timesteps, float32."""
        if not isinstance(number, (int, float)):
            number = number.astype("float32").reshape([-1, 1])
        angles = number * self._frequencies(dim)
        parts = [paddle.sin(angles), paddle.cos(angles)]
        if self.config.flip_sin_to_cos:
            parts = parts[::-1]
        return paddle.concat(parts, axis=-1)

    def _frequencies(self, dim: int) -> paddle.Tensor:
        """Those of `_embed_number`, float32 [1, dim / 2]; kept for the next step as `_table` is, where the host would wait for
        the device to copy them."""
        key = (dim, paddle.get_device())
        if paddle.in_dynamic_mode() and key in self.frequencies:
            return self.frequencies[key]
        half = dim // 2
        # exactly rounded, not by the device's exp: an angle is up to 999 times as wrong as its frequency
        exponents = np.float32(-math.log(THETA)) * np.arange(half, dtype=np.float32) / np.float32(half - self.config.freq_shift)
        frequencies = paddle.to_tensor(np.exp(exponents.astype(np.float64)).astype(np.float32)).unsqueeze(0)
        if paddle.in_dynamic_mode():
            self.frequencies[key] = frequencies
        return frequencies

    def _check(self, hidden_states, encoder_hidden_states, timestep_cond, ofs, image_rotary_emb) -> None:
        """Raises ValueError for inputs that do not fit, before any work."""
        config = self.config
        if len(hidden_states.shape) != 5 or hidden_states.shape[2] != config.in_channels:
            raise ValueError(
                f"latents must be [batch, frames, {config.in_channels}, height, width], got {list(hidden_states.shape)}"
            )
        _, frames, _, height, width = hidden_states.shape
        patch, patch_t = config.patch_size, config.patch_size_t or 1
        if height % patch or width % patch or frames % patch_t:
            raise ValueError(
                f"latents of {frames} frames, {height} x {width} do not divide into patches of {patch_t} x {patch} x {patch}; "
                f"choose a height and width that are multiples of {patch} and frames that are a multiple of {patch_t}"
            )
        if len(encoder_hidden_states.shape) != 3 or encoder_hidden_states.shape[2] != config.text_embed_dim:
            raise ValueError(
                f"text embeddings must be [batch, tokens, {config.text_embed_dim}], got {list(encoder_hidden_states.shape)}"
            )
        if encoder_hidden_states.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"{hidden_states.shape[0]} latents and {encoder_hidden_states.shape[0]} text embeddings: the batch must agree"
            )
        if config.use_learned_positional_embeddings:
            if (height, width) != (config.sample_height, config.sample_width):
                raise ValueError(
                    f"learned positions serve latents of {config.sample_height} x {config.sample_width} only, "
                    f"got {height} x {width}"
                )
            if encoder_hidden_states.shape[1] != config.max_text_seq_length:
                raise ValueError(
                    f"learned positions serve {config.max_text_seq_length} text tokens only, "
                    f"got {encoder_hidden_states.shape[1]}"
                )
        if timestep_cond is not None:
            raise ValueError("timestep_cond is given, and no CogVideoX has a projection for it; pass None")
        if (ofs is None) != (self.ofs_embedding is None):
            raise ValueError("`ofs` belongs to models with ofs_embed_dim: " + (
                "this one needs it" if ofs is None else "this one has none, pass None"))
        if image_rotary_emb is not None:
            tokens = (frames // patch_t) * (height // patch) * (width // patch)
            for name, table in zip(("cos", "sin"), image_rotary_emb):
                if list(table.shape) != [tokens, config.attention_head_dim]:
                    raise ValueError(
                        f"image_rotary_emb: {name} is {list(table.shape)}, these latents need "
                        f"{[tokens, config.attention_head_dim]}; see rotary_tables"
                    )

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processors by name, such as "transformer_blocks.0.attn1.processor"."""
        return {f"{name}.processor": layer.processor for name, layer in self._attention_layers()}

    def set_attn_processor(self, processor: Any) -> None:
        """Sets one processor for all attention modules, or each its own from a dict by name.

        Raises:
            ValueError: a dict that lacks names of `attn_processors` or has others.
        """
        layers = {f"{name}.processor": layer for name, layer in self._attention_layers()}
        if not isinstance(processor, Mapping):
            for layer in layers.values():
                layer.set_processor(processor)
            return
        missing = [name for name in layers if name not in processor]
        unknown = [name for name in processor if name not in layers]
        if missing or unknown:
            raise ValueError(
                f"a dict of attention processors must name each of the {len(layers)} modules once; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(map(str, unknown)) or 'none'}"
            )
        for value in processor.values():
            check_processor(value)
        for name, layer in layers.items():
            layer.set_processor(processor[name])

    def _attention_layers(self) -> list[tuple[str, Attention]]:
        return [(name, layer) for name, layer in self.named_sublayers() if isinstance(layer, Attention)]


def _linear(in_channels: int, out_channels: int, bias: bool) -> nn.Linear:
    return nn.Linear(in_channels, out_channels, bias_attr=None if bias else False)


def _layer_norm(width: int, epsilon: float, affine: bool) -> nn.LayerNorm:
    attribute = None if affine else False
    return nn.LayerNorm(width, epsilon, weight_attr=attribute, bias_attr=attribute)
