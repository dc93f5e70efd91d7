"""A small CogVideoX pipeline with random weights, in the layout of the published ones: for tests, and for trying things out.

Its videos are coloured noise, but every part does its work: tokens, text embeddings, guidance, attention with head dim 64,
the VAE. It is made by Paddle and NumPy alone, the same for the same seed on every machine.
"""
from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import paddle

from ..shared.pipeline import on_device
from ..shared.t5 import T5EncoderModel
from ..shared.t5_tokenizer import T5Tokenizer
from .pipeline import CogVideoXPipeline
from .scheduler import CogVideoXDDIMScheduler
from .scheduler_dpm import CogVideoXDPMScheduler
from .transformer import CogVideoXTransformer3DModel
from .vae import AutoencoderKLCogVideoX

KINDS = ("2b", "5b", "1.5")
EXTRA_IDS = 100
VOCABULARY_SIZE = 96
PIXEL_SPREAD = 0.4  # keeps most of the random pixels between black and white
# What the tokenizer's pieces are learned from.
SENTENCES = (
    "a panda plays the guitar in a quiet forest", "a red ball rolls over the blue table", "waves break on a sandy beach",
    "a cat runs across a snowy street at night", "the sun goes down behind green hills", "a slow train leaves the station",
    "two birds fly over the old white house", "a child draws a yellow circle", "smoke rises from a small fire",
    "rain falls on the window of a dark room", "a car turns left and stops", "a robot waters the flowers",
)
# The scheduler of each published model.
SCHEDULE = {
    "clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
}
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 8, "out_channels": 8, "time_embed_dim": 64,
    "text_embed_dim": 32, "num_layers": 2, "sample_width": 20, "sample_height": 12, "sample_frames": 17,
    "max_text_seq_length": 24,
}
TEXT_ENCODER = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
VAE = {
    "block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1, "latent_channels": 8,
    "sample_height": 96, "sample_width": 160,
}
BY_KIND: dict[str, dict[str, Any]] = {
    "2b": {"scheduler": (CogVideoXDDIMScheduler, 3.0), "transformer": {}, "vae": {"scaling_factor": 1.15258426}},
    "5b": {
        "scheduler": (CogVideoXDPMScheduler, 1.0),
        "transformer": {"use_rotary_positional_embeddings": True},
        "vae": {"scaling_factor": 0.7},
    },
    "1.5": {
        "scheduler": (CogVideoXDPMScheduler, 1.0),
        "transformer": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
        "vae": {"scaling_factor": 0.7, "invert_scale_latents": True},
    },
}


def make_random_pipeline(folder: str | os.PathLike, seed: int = 0, kind: str = "2b") -> str:
    """Writes a small random pipeline as a folder in diffusers' layout.

    Default size of its videos: 17 frames of 96 x 160, 300 video tokens and 24 text tokens (1.5: 180 video tokens).

    Args:
        folder: made if need be.
        seed: of the weights.
        kind: which published model it is a small copy of: "2b" (sine-cosine positions, DDIM), "5b" (rotary positions, DPM),
            "1.5" (patches of two frames, DPM).
    Returns:
        the folder.
    Raises:
        ValueError: a kind that is none of these.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; supported: {', '.join(KINDS)}")
    changes = BY_KIND[kind]
    scheduler_class, shift = changes["scheduler"]
    tokenizer = make_tokenizer()
    with on_device("cpu"):
        parts = [
            T5EncoderModel(vocab_size=len(tokenizer), **TEXT_ENCODER),
            CogVideoXTransformer3DModel(**{**TRANSFORMER, **changes["transformer"]}),
            AutoencoderKLCogVideoX(**{**VAE, **changes["vae"]}),
        ]
        for i, part in enumerate(parts):
            _fill(part, np.random.default_rng([seed, i]))
            part.eval()
        pipeline = CogVideoXPipeline(tokenizer, *parts, scheduler_class(snr_shift_scale=shift, **SCHEDULE), device="cpu")
        pipeline.save_pretrained(folder)
    return os.fspath(folder)


def make_tokenizer() -> T5Tokenizer:
    """A tokenizer whose pieces are learned from SENTENCES; bytes stand in for letters that it never saw."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=VOCABULARY_SIZE + 256, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", byte_fallback=True,
        hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )
    return T5Tokenizer(model.getvalue(), EXTRA_IDS)


def _fill(model: paddle.nn.Layer, generator: np.random.Generator) -> None:
    """Normal weights that keep the size of what passes through; norms near 1, biases near 0."""
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        noise = generator.standard_normal(shape)
        if len(shape) == 1:
            value = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        else:
            # Paddle's Linear is [in, out], its convolutions [out, in, ...], an embedding [rows, out]
            fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
            value = noise if "shared" in name or "relative_attention_bias" in name else noise / np.sqrt(fan_in)
            if name == "decoder.conv_out.conv.weight":
                value *= PIXEL_SPREAD
        parameter.set_value(value.astype(np.float32))
