"""The T5 encoder: prompt tokens to text embeddings.

Serves T5 v1.1 (gated GELU; CogVideoX uses its XXL size) and the first T5 (ReLU). Names of layers are those of the published
weights. Norms, attention probabilities and, for float16 weights, the residual sum are float32.
Source: transformers, models/t5/modeling_t5.py (behaviour; own code); Raffel et al. 2020, section 2.1.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from .config import Config, check_between, keep_config
from .weights import Model

FLOAT16_MAX = 65504.0
FLOAT32_MIN = -3.4028234663852886e38


def _gelu_tanh(x):
    return F.gelu(x, approximate=True)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_new": _gelu_tanh, "silu": F.silu, "swish": F.silu}


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each key relative to each query, [length, length] int64.

    Half of the buckets are for keys behind the query, half for keys ahead; in each half the first half counts single
    positions and the rest grows logarithmically up to max_distance.
    """
    offsets = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offsets)
    # float32, as the original rounds: a bucket's edge falls between float32 neighbours
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * np.float32(half - exact)).astype(np.int64)
    buckets = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return buckets + np.where(offsets > 0, half, 0)


class T5LayerNorm(nn.Layer):
    """Division by the root mean square, in float32; no mean, no bias."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, x):
        """[..., C] -> [..., C], in the type of the weight."""
        x = x.astype("float32")
        x = x * paddle.rsqrt(paddle.mean(x * x, axis=-1, keepdim=True) + self.epsilon)
        return self.weight * x.astype(self.weight.dtype)


class T5Attention(nn.Layer):
    """Self-attention with a bias for relative positions and without scaling."""

    def __init__(self, config: Config, has_relative_attention_bias: bool):
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.d_kv
        self.num_buckets, self.max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias_attr=False)
        self.k = nn.Linear(config.d_model, inner, bias_attr=False)
        self.v = nn.Linear(config.d_model, inner, bias_attr=False)
        self.o = nn.Linear(inner, config.d_model, bias_attr=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_heads)

    def position_bias(self, length: int) -> paddle.Tensor:
        """Returns the bias of each head, [1, H, N, N] float32."""
        buckets = paddle.to_tensor(relative_position_buckets(length, self.num_buckets, self.max_distance))
        return self.relative_attention_bias(buckets).astype("float32").transpose([2, 0, 1]).unsqueeze(0)

    def forward(self, x, bias):
        """[B, N, C] -> [B, N, C]; bias [1 or B, H, N, N] float32 is added to the scores."""
        batch, length = x.shape[0], x.shape[1]
        shape = [batch, length, self.heads, self.head_dim]
        q = self.q(x).reshape(shape).transpose([0, 2, 1, 3])
        k = self.k(x).reshape(shape).transpose([0, 2, 3, 1])
        v = self.v(x).reshape(shape).transpose([0, 2, 1, 3])
        scores = paddle.matmul(q, k).astype("float32") + bias
        out = paddle.matmul(F.softmax(scores, axis=-1).astype(v.dtype), v)
        return self.o(out.transpose([0, 2, 1, 3]).reshape([batch, length, self.heads * self.head_dim]))


class T5LayerSelfAttention(nn.Layer):
    """Norm, attention, residual sum."""

    def __init__(self, config: Config, has_relative_attention_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_relative_attention_bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x, bias):
        """[B, N, C] -> [B, N, C]."""
        return x + _finite(self.SelfAttention(self.layer_norm(x), bias)).astype(x.dtype)


class T5DenseGatedActDense(nn.Layer):
    """Feed-forward of T5 v1.1: one linear layer gates another."""

    def __init__(self, config: Config, activation: str):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias_attr=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias_attr=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias_attr=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        """[B, N, C] -> [B, N, C], in the type of `wo`."""
        return self.wo((self.activation(self.wi_0(x)) * self.wi_1(x)).astype(self.wo.weight.dtype))


class T5DenseActDense(nn.Layer):
    """Feed-forward of the first T5."""

    def __init__(self, config: Config, activation: str):
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias_attr=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias_attr=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        """[B, N, C] -> [B, N, C], in the type of `wo`."""
        return self.wo(self.activation(self.wi(x)).astype(self.wo.weight.dtype))


class T5LayerFF(nn.Layer):
    """Norm, feed-forward, residual sum."""

    def __init__(self, config: Config):
        super().__init__()
        gated, activation = _feed_forward_kind(config.feed_forward_proj)
        self.DenseReluDense = (T5DenseGatedActDense if gated else T5DenseActDense)(config, activation)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x):
        """[B, N, C] -> [B, N, C]."""
        return x + self.DenseReluDense(self.layer_norm(x)).astype(x.dtype)


class T5Block(nn.Layer):
    """Attention and feed-forward."""

    def __init__(self, config: Config, has_relative_attention_bias: bool):
        super().__init__()
        self.layer = nn.LayerList([T5LayerSelfAttention(config, has_relative_attention_bias), T5LayerFF(config)])

    def forward(self, x, bias):
        """[B, N, C] -> [B, N, C]."""
        return self.layer[1](self.layer[0](x, bias))


class T5Stack(nn.Layer):
    """All blocks; the first one's position bias serves every block."""

    def __init__(self, config: Config):
        super().__init__()
        self.block = nn.LayerList([T5Block(config, i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, embeddings, attention_mask=None):
        """[B, N, C] -> [B, N, C]."""
        bias = self.block[0].layer[0].SelfAttention.position_bias(embeddings.shape[1])
        if attention_mask is not None:
            hidden = (1.0 - attention_mask.astype("float32")) * FLOAT32_MIN
            bias = bias + hidden.unsqueeze(1).unsqueeze(1)
        # float16 sums of many blocks leave float16's range
        x = embeddings.astype("float32") if embeddings.dtype == paddle.float16 else embeddings
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5EncoderModel(Model):
    """The encoder half of T5. Arguments have the names of transformers' T5Config.

    Args:
        vocab_size: rows of the embedding.
        d_model: width. d_kv: head dim. num_heads: heads; num_heads * d_kv need not be d_model.
        d_ff: width between the feed-forward's linear layers.
        num_layers: blocks.
        relative_attention_num_buckets, relative_attention_max_distance: of the position bias.
        layer_norm_epsilon: of all norms.
        feed_forward_proj: "gated-gelu" (v1.1), "relu", or either form with another activation.
        dropout_rate, initializer_factor, pad_token_id, eos_token_id: kept for config.json; nothing here uses them.
    Raises:
        ValueError: a feed_forward_proj that is not known.
    """

    weights_stem = "model"
    also_reads = ("T5ForConditionalGeneration", "T5Model")
    # the decoder's, and what other keys say already
    ignored_keys = (
        "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "dense_act_fn", "is_gated_act",
        "tie_word_embeddings", "scale_decoder_outputs", "is_encoder_decoder", "is_decoder", "use_cache", "output_past",
        "num_decoder_layers", "decoder_start_token_id", "n_positions", "task_specific_params", "classifier_dropout",
        "bos_token_id", "gradient_checkpointing", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
        "output_attentions", "output_hidden_states", "return_dict", "paddlenlp_version", "tensor_parallel_output",
    )
    ignored_tensors = (r"^decoder\.", r"^lm_head\.")
    tied_tensors = {"encoder.embed_tokens.weight": "shared.weight"}
    repeated = {"num_layers": r"^encoder\.block\.(\d+)\."}
    # these products overflow float16 in the published weights
    float32_tensors = (r"\.wo\.weight$",)

    @keep_config
    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 512,
        d_kv: int = 64,
        d_ff: int = 2048,
        num_layers: int = 6,
        num_heads: int = 8,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        dropout_rate: float = 0.1,
        layer_norm_epsilon: float = 1e-6,
        initializer_factor: float = 1.0,
        feed_forward_proj: str = "relu",
        pad_token_id: int = 0,
        eos_token_id: int = 1,
    ):
        super().__init__()
        counts = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "relative_attention_max_distance")
        check_between(self.config, counts, 1, 2**24)
        check_between(self.config, ("relative_attention_num_buckets",), 4, 2**16)
        check_between(self.config, ("layer_norm_epsilon",), 0.0, 1.0)
        _feed_forward_kind(feed_forward_proj)
        self.shared = nn.Embedding(vocab_size, d_model)
        self.encoder = T5Stack(self.config)

    def forward(self, input_ids, attention_mask=None):
        """Encodes token ids.

        Args:
            input_ids: [B, N] integers.
            attention_mask: [B, N], 1 for tokens and 0 for padding; None: all are attended to, as CogVideoX does.
        Returns:
            [B, N, d_model], in the type of the weights.
        """
        return self.encoder(self.shared(input_ids), attention_mask)

    def config_json(self) -> dict[str, Any]:
        """Returns what config.json holds, as transformers writes it."""
        gated, activation = _feed_forward_kind(self.config.feed_forward_proj)
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "is_gated_act": gated,
            "dense_act_fn": activation,
            "is_encoder_decoder": False,
            "use_cache": False,
            "tie_word_embeddings": True,
            "torch_dtype": str(self.dtype).split(".")[-1],
            **self.config,
        }


def _feed_forward_kind(text: str) -> tuple[bool, str]:
    """Returns whether the feed-forward is gated, and its activation's name."""
    gated = text.startswith("gated-")
    activation = "gelu_new" if text == "gated-gelu" else text.removeprefix("gated-")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"feed_forward_proj {text!r} is not supported; use one of {', '.join(ACTIVATIONS)}, alone or after 'gated-'"
        )
    return gated, activation


def _finite(x):
    """Brings float16 infinities back to float16's largest numbers."""
    return paddle.clip(x, -FLOAT16_MAX, FLOAT16_MAX) if x.dtype == paddle.float16 else x
