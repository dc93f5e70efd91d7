"""The denoising loop: one prediction and one scheduler step for each timestep, the same for every model."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paddle
from tqdm import tqdm

from .compiling import readable_failures

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
Callback = Callable[[Any, int, int, dict], Mapping | None]
"""Called as (pipeline, step, timestep, tensors) after each step; what it returns under a name replaces that tensor."""


def denoise(
    pipe: Any,
    predict: Callable[[paddle.Tensor, paddle.Tensor, paddle.Tensor], paddle.Tensor],
    latents: paddle.Tensor,
    embeds: paddle.Tensor,
    negative: paddle.Tensor | None,
    draw: Callable[[], paddle.Tensor],
    guidance_at: Callable[[int], float] | None = None,
    callback: Callback | None = None,
    callback_tensors: Sequence[str] = ("latents",),
    progress: bool = True,
) -> paddle.Tensor:
    """Takes latents along the timesteps of the pipeline's scheduler, or until `pipe.interrupt` is set.

    Args:
        pipe: its `scheduler` has its timesteps set; its `guidance_scale` weighs the prompt, and may change between steps; its
            `interrupted()` is asked after each, and `shows(progress)` before.
        predict: (latents, text embeddings, timesteps [B]) -> the model's prediction; twice the batch where there is guidance.
        latents: starting noise [B, ...], float32.
        embeds: text embeddings [B, N, D]; where there is guidance [2B, N, D], the negative ones first.
        negative: the negative embeddings alone; None leaves guidance out.
        draw: makes noise like the latents, for a scheduler that adds some.
        guidance_at: the guidance scale at a timestep, where it changes along the steps.
        callback, callback_tensors: see Callback; which of CALLBACK_TENSORS it gets.
        progress: show a progress bar.
    Returns:
        latents [B, ...], float32.
    """
    scheduler, guided = pipe.scheduler, negative is not None
    before, clean = None, None
    with tqdm(total=len(scheduler.timesteps), desc="denoise", disable=not pipe.shows(progress)) as bar:
        for step, timestep in enumerate(map(int, scheduler.timesteps)):
            model_input = paddle.concat([latents] * 2) if guided else latents
            model_input = scheduler.scale_model_input(model_input, timestep)
            with readable_failures():
                predicted = predict(model_input, embeds, paddle.full([model_input.shape[0]], timestep, dtype="int64"))
            predicted = predicted.astype("float32")
            if guidance_at is not None:
                pipe.guidance_scale = guidance_at(timestep)
            if guided:
                unguided, prompted = paddle.chunk(predicted, 2)
                predicted = unguided + pipe.guidance_scale * (prompted - unguided)
            if scheduler.uses_noise:
                latents, clean = scheduler.step(predicted, clean, timestep, before, latents, noise=draw())
            else:
                latents, clean = scheduler.step(predicted, timestep, latents)
            before = timestep
            if callback is not None:
                tensors = {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
                changed = callback(pipe, step, timestep, {name: tensors[name] for name in callback_tensors}) or {}
                latents = changed.get("latents", latents)
                embeds = changed.get("prompt_embeds", embeds)
            bar.update()
            if pipe.interrupted():
                break
    return latents
