"""A pipeline as small as can be, with the real one's call: three attention blocks turn seeded noise into a moving picture."""
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
from paddle import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowbit_video import denoising_step  # noqa: E402

from toy_model import Attention  # noqa: E402

HEADS, HEAD_DIM, TEXT_TOKENS = 2, 32, 6
FRAMES, ROWS, COLUMNS, PIXELS = 5, 6, 8, 6  # tokens of a clip, and pixels a token


class Block(nn.Layer):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention(HEADS, HEAD_DIM)

    def forward(self, video, text):
        more_video, more_text = self.attn1(video, text)
        return video + more_video, text + more_text


class Transformer(nn.Layer):
    def __init__(self, layers):
        super().__init__()
        self.transformer_blocks = nn.LayerList([Block() for _ in range(layers)])

    def forward(self, video, text):
        for block in self.transformer_blocks:
            video, text = block(video, text)
        return video


class ToyPipeline:
    """pipe(prompt, seed=, num_inference_steps=, output_type="np" | "latent", callback_on_step_end=) -> .frames."""

    def __init__(self, seed=0, layers=3, grid=(FRAMES, ROWS, COLUMNS)):
        paddle.seed(seed)
        self.transformer = Transformer(layers)
        self.transformer.eval()
        width = HEADS * HEAD_DIM
        rng = np.random.default_rng(seed)
        self.paint = rng.standard_normal((width, 3)).astype(np.float32) / width**0.5
        self.grid = grid
        t, y, x = np.meshgrid(*map(np.arange, grid), indexing="ij")
        waves = np.stack([np.sin(k * (x + t) / 3 + y * (k % 3) / 2) for k in range(1, width + 1)], -1)
        self.place = waves.reshape(1, -1, width).astype(np.float32)

    def __call__(self, prompt, seed=0, num_inference_steps=3, guidance_scale=3.0, output_type="np", callback_on_step_end=None,
                 **ignored):
        width = HEADS * HEAD_DIM
        words = np.random.default_rng(zlib.crc32(prompt.encode())).standard_normal((1, TEXT_TOKENS, width))
        text = paddle.to_tensor(np.concatenate([np.zeros_like(words), words]).astype(np.float32))
        latents = np.random.default_rng(seed).standard_normal(self.place.shape).astype(np.float32)
        with paddle.no_grad():
            for step in range(num_inference_steps):
                seen = paddle.to_tensor(np.repeat(latents + self.place, 2, axis=0))
                with denoising_step(self, step, num_inference_steps):
                    blank, asked = self.transformer(seen, text).numpy()
                velocity = blank + guidance_scale * (asked - blank)
                latents = latents + (np.tanh(velocity)[None] - latents) / num_inference_steps
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, 1000 - step, {"latents": paddle.to_tensor(latents)})
        if output_type == "latent":
            return SimpleNamespace(frames=paddle.to_tensor(latents))
        picture = 1 / (1 + np.exp(-4 * (latents @ self.paint).reshape(1, *self.grid, 3)))
        return SimpleNamespace(frames=picture.repeat(PIXELS, 2).repeat(PIXELS, 3).astype(np.float32))
