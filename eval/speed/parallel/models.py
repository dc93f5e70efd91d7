"""CogVideoX transformers and VAEs of full size with random weights, made on the device: speed does not depend on the values."""
from __future__ import annotations

from typing import Any

from ..cogvideox import CONFIGS
from ..random_weights import random_paddle

SPREAD = 0.02
"""Standard deviation of the weights."""


def paddle_transformer(model: str) -> Any:
    """Ours, in float16, on Paddle's current device."""
    from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel

    return random_paddle(lambda: CogVideoXTransformer3DModel(**CONFIGS[model]), "float16", _spread)


def paddle_vae() -> Any:
    """Ours, in float16, on Paddle's current device."""
    from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX

    return random_paddle(AutoencoderKLCogVideoX, "float16", _spread)


def _spread(name: str, shape: list[int]) -> float:
    """Of matrices and kernels; norms stay one and biases zero."""
    return SPREAD if len(shape) > 1 else 0.0


def torch_transformer(model: str) -> Any:
    """That of diffusers, in float16, on torch's current CUDA device."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        made = CogVideoXTransformer3DModel(**CONFIGS[model])
    made = made.half().to_empty(device="cuda").eval()
    torch.manual_seed(0)  # every rank's model is the same
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, SPREAD) if parameter.dim() > 1 else parameter.zero_()
        for module in made.modules():
            if isinstance(module, torch.nn.LayerNorm) and module.weight is not None:
                module.weight.fill_(1.0)
        buffer = getattr(made.patch_embed, "pos_embedding", None)
        if buffer is not None:
            buffer.normal_(0, SPREAD)
    return made
