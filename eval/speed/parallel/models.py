"""CogVideoX transformers and VAEs of full size with random weights, made on the device: speed does not depend on the values."""
from __future__ import annotations

from typing import Any

from ..inputs import fill_normal

CONFIGS = {
    "2b": dict(num_layers=30),
    "5b": dict(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True),
    "1.5-5b": dict(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True, patch_size_t=2,
                   sample_height=300, sample_width=300, sample_frames=81, patch_bias=False),
}
"""What differs from the 2b model's configuration, by model."""
LATENTS = {"2b": (13, 60, 90), "5b": (13, 60, 90), "1.5-5b": (22, 96, 170)}
"""Frames, height and width of the latents: 17550, 17550 and 44880 video tokens."""
SPREAD = 0.02
"""Standard deviation of the weights."""


def paddle_transformer(model: str) -> Any:
    """Ours, in float16, on Paddle's current device."""
    import paddle

    from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel

    return _random(lambda: CogVideoXTransformer3DModel(**CONFIGS[model]), paddle)


def paddle_vae() -> Any:
    """Ours, in float16, on Paddle's current device."""
    import paddle

    from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX

    return _random(AutoencoderKLCogVideoX, paddle)


def _random(make: Any, paddle: Any) -> Any:
    """A Paddle model whose matrices and kernels are normal, norms one and biases zero."""
    from lowbit_video.runtime import paddle_runtime

    paddle.set_default_dtype("float16")
    paddle.nn.initializer.set_global_initializer(paddle.nn.initializer.Constant(1.0), paddle.nn.initializer.Constant(0.0))
    try:
        model = make()
    finally:
        paddle.nn.initializer.set_global_initializer(None)
        paddle.set_default_dtype("float32")
    model.eval()
    with paddle.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if len(parameter.shape) > 1:
                count = int(parameter.size)
                with paddle_runtime.launch_guard(parameter):
                    fill_normal(parameter, (1, 1, 1, count), number)
                parameter.scale_(SPREAD)
    return model


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
