"""diffusers' CogVideoX pipeline on PyTorch, called as the pipelines of this project are."""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit_video.installing import pip_install


class TorchPipeline:
    """pipe(prompt, seed=, output_type=, callback_on_step_end=, ...) -> .frames, by diffusers.

    folder: a model's, in diffusers' layout, or a hub id. dtype: "float32", "float16" or "bfloat16". device: as torch names it,
        or "auto", a GPU if there is one. `transformer` and `scheduler` are diffusers' own.

    A seed gives the noise that it gives in Paddle. Raises ImportError where torch or diffusers is not installed.
    """

    def __init__(self, folder: str, dtype: str = "float32", device: str = "auto") -> None:
        missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"--framework torch needs {' and '.join(missing)}: {pip_install('diffusers')}")
        import torch
        from diffusers import CogVideoXPipeline

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe = CogVideoXPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
        self.transformer, self.scheduler = self.pipe.transformer, self.pipe.scheduler
        self.device_name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"

    def __call__(self, prompt: str, seed: int = 0, output_type: str = "np", progress: bool = True,
                 callback_on_step_end: Callable | None = None, num_frames: int | None = None, height: int | None = None,
                 width: int | None = None, **named: Any) -> Any:
        """One video. named: what else diffusers' pipeline takes, under its names."""
        import torch

        pipe, config = self.pipe, self.transformer.config
        pipe.set_progress_bar_config(disable=not progress)
        num_frames = num_frames or config.sample_frames
        height = height or config.sample_height * pipe.vae_scale_factor_spatial
        width = width or config.sample_width * pipe.vae_scale_factor_spatial
        shape = ((num_frames - 1) // pipe.vae_scale_factor_temporal + 1, config.in_channels,
                 height // pipe.vae_scale_factor_spatial, width // pipe.vae_scale_factor_spatial)
        noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        latents = torch.from_numpy(noise[None]).to(pipe.device, self.transformer.dtype)
        return pipe(prompt=prompt, latents=latents, num_frames=num_frames, height=height, width=width, output_type=output_type,
                    max_sequence_length=config.max_text_seq_length, callback_on_step_end=callback_on_step_end, **named)
