"""The denoising loop: one prediction and one scheduler step for each timestep, the same for every model."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from tqdm import tqdm

from lowbit_video.hook.recipe.clock import denoising_step

from .compiling import readable_failures
from .conditions import Callback, Conditions


def denoise(
    pipe: Any,
    predict: Callable[[paddle.Tensor, paddle.Tensor, paddle.Tensor], paddle.Tensor],
    latents: paddle.Tensor,
    embeds: paddle.Tensor,
    guided: bool,
    draw: Callable[[], paddle.Tensor],
    guidance_at: Callable[[int], float] | None = None,
    callback: Callback | None = None,
    callback_tensors: Sequence[str] = ("latents",),
    progress: bool = True,
) -> paddle.Tensor:
    """Takes latents along the timesteps of the pipeline's scheduler, or until `pipe.interrupt` is set.

    Args:
        pipe: its `scheduler` has its timesteps set; its `guidance_scale` weighs the prompt, and a callback may change it
            between steps; its `interrupted()` is asked after each, and `shows(progress)` before.
        predict: (latents, text embeddings, timesteps [B]) -> the model's prediction; twice the batch where there is guidance.
        latents: starting noise [B, ...], float32.
        embeds: text embeddings [B, N, D]; where `guided` [2B, N, D], the negative ones first.
        guided: whether there is guidance.
        draw: makes noise like the latents, for a scheduler that adds some.
        guidance_at: the guidance scale at a timestep, where it changes along the steps.
        callback, callback_tensors: see Callback; which of CALLBACK_TENSORS it gets.
        progress: show a progress bar.
    Returns:
        latents [B, ...], float32.
    """
    scheduler, conditions = pipe.scheduler, Conditions(embeds, guided, guidance_at)
    before, clean = None, None
    with tqdm(total=len(scheduler.timesteps), desc="denoise", disable=not pipe.shows(progress)) as bar:
        for step, timestep in enumerate(map(int, scheduler.timesteps)):
            model_input = paddle.concat([latents] * 2) if conditions.guided else latents
            model_input = scheduler.scale_model_input(model_input, timestep)
            with readable_failures(), denoising_step(pipe, step, len(scheduler.timesteps)):
                timesteps = paddle.full([model_input.shape[0]], timestep, dtype="int64")
                predicted = predict(model_input, conditions.embeds, timesteps)
            predicted = conditions.guide(pipe, predicted.astype("float32"), timestep)
            if scheduler.uses_noise:
                latents, clean = scheduler.step(predicted, clean, timestep, before, latents, noise=draw())
            else:
                latents, clean = scheduler.step(predicted, timestep, latents)
            before = timestep
            if callback is not None:
                latents = conditions.call(callback, callback_tensors, pipe, step, timestep, latents)
            bar.update()
            if pipe.interrupted():
                break
    return latents
