"""CogVideoX pipelines of full size without a file: random weights made on the device, a tokenizer made of a dozen sentences."""
from __future__ import annotations

from typing import Any

from lowbit_video.pipelines.cogvideox import random_model
from lowbit_video.pipelines.cogvideox.pipeline import CogVideoXPipeline
from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX
from lowbit_video.pipelines.shared.on_demand import OnDemand
from lowbit_video.pipelines.shared.pipeline import on_device
from lowbit_video.pipelines.shared.t5 import T5EncoderModel

from ..cogvideox import CONFIGS
from ..random_weights import RandomWeights, fan_in

KINDS = {"2b": "2b", "5b": "5b", "1.5-5b": "1.5"}
"""How the small random models are called that are made alike."""
T5_XXL = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
"""Source: the file config.json of google/t5-v1_1-xxl, the text encoder of every CogVideoX."""


def random_pipeline(size: str, dtype: str, device: str, low_memory: bool = False, tiny: bool = False
                    ) -> tuple[CogVideoXPipeline, dict[str, RandomWeights]]:
    """(the pipeline, what makes the weights of its parts by name).

    size: one of KINDS. low_memory: as for `from_pretrained`; weights are then made whenever they are needed. tiny: all parts
    small.
    """
    kind = random_model.BY_KIND[KINDS[size]]
    tokenizer = random_model.make_tokenizer()
    configs = {
        "text_encoder": (T5EncoderModel, dict(random_model.TEXT_ENCODER, vocab_size=len(tokenizer)) if tiny else T5_XXL),
        "transformer": (CogVideoXTransformer3DModel,
                        random_model.TRANSFORMER | kind["transformer"] if tiny else CONFIGS[size]),
        "vae": (AutoencoderKLCogVideoX, (random_model.VAE if tiny else {}) | kind["vae"]),
    }
    parts: dict[str, Any] = {}
    weights: dict[str, RandomWeights] = {}
    with on_device(device):
        for name, (model_class, config) in configs.items():
            parts[name], weights[name] = model_class.from_config(config), RandomWeights(dtype, spread)
            if low_memory and name != "vae":
                parts[name].stored = weights[name]
            else:
                weights[name].read(parts[name])
        scheduler, shift = kind["scheduler"]
        pipe = CogVideoXPipeline(tokenizer, *parts.values(), scheduler(snr_shift_scale=shift, **random_model.SCHEDULE),
                                 device=device)
    if low_memory:
        pipe.on_demand = OnDemand(device, [parts["text_encoder"], parts["transformer"]])
    return pipe, weights


def spread(name: str, shape: list[int]) -> float:
    """Standard deviation that keeps the size of what passes through, and most pixels between black and white."""
    if len(shape) < 2:
        return 0.0
    if "shared" in name or "relative_attention_bias" in name:  # embeddings
        return 1.0
    return fan_in(shape) ** -0.5 * (random_model.PIXEL_SPREAD if name == "decoder.conv_out.conv.weight" else 1.0)
