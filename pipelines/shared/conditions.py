"""What the denoising is steered by: text embeddings and guidance, and what a callback changes of them between steps."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from lowbit_video.arguments import number

from .inputs import check_finite, here

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
Callback = Callable[[Any, int, int, dict], Mapping | None]
"""Called as (pipeline, step, timestep, tensors) after each step; what it returns under a name replaces that tensor."""

NEVER_GUIDED = "guidance was left out from the start: call the pipeline with a guidance_scale above 1"


def guidance(name: str, value: Any) -> float:
    """A guidance scale as a float. TypeError for what is no number, ValueError for one that float32 does not hold."""
    scale = number(name, value)
    if abs(scale) > float(np.finfo(np.float32).max):  # as a NumPy number it would cast the scale first
        raise ValueError(f"{name} is {scale}; give one that float32 holds, CogVideoX's is 6")
    return scale


class Conditions:
    """Embeddings of the prompt and of the negative prompt; `guided` says whether the next step takes both.

    embeds: [B, N, D]; where `guided` [2B, N, D], the negative ones first.
    guidance_at: the guidance scale at a timestep, where it changes along the steps.
    """

    def __init__(self, embeds: paddle.Tensor, guided: bool, guidance_at: Callable[[int], float] | None = None) -> None:
        self.embeds, self.guided, self.guidance_at = embeds, guided, guidance_at
        self.negative, self.positive = paddle.chunk(embeds, 2) if guided else (None, embeds)

    def call(self, callback: Callback, names: Sequence[str], pipe: Any, step: int, timestep: int, latents: paddle.Tensor
             ) -> paddle.Tensor:
        """Calls back and takes what it changes; returns the latents of the next step.

        Raises ValueError or TypeError for what cannot be taken: it would be ignored else.
        """
        given = {"latents": latents, "prompt_embeds": self.embeds, "negative_prompt_embeds": self.negative}
        scale = pipe.guidance_scale
        returned = callback(pipe, step, timestep, {name: given[name] for name in names})
        if returned is not None and not isinstance(returned, Mapping):
            raise TypeError(f"callback_on_step_end returned a {type(returned).__name__}; return a dict of tensors by name "
                            f"({', '.join(CALLBACK_TENSORS)}), or None")
        unknown = [str(name) for name in returned or () if name not in CALLBACK_TENSORS]
        if unknown:
            raise ValueError(f"callback_on_step_end returned {', '.join(unknown)}; what it can replace: "
                             f"{', '.join(CALLBACK_TENSORS)}; the guidance is set as pipe.guidance_scale")
        changed = {name: here(value, f"{name} returned by callback_on_step_end") for name, value in (returned or {}).items()
                   if value is not given[name]}
        for name in changed.keys() - {"latents"}:  # as of a call's arguments: latents are looked at when pixels are made
            check_finite(changed[name], f"{name} returned by callback_on_step_end")
        pipe.guidance_scale = guidance("pipe.guidance_scale", pipe.guidance_scale)
        if pipe.guidance_scale != scale:
            self._set_guidance(pipe.guidance_scale)
        self._take_embeds(changed)
        new = changed.get("latents", latents)
        if new.shape != latents.shape:
            raise ValueError(f"callback_on_step_end returned latents {list(new.shape)}; these videos need "
                             f"{list(latents.shape)}")
        return new.astype("float32")

    def _set_guidance(self, scale: float) -> None:
        """A guidance that a callback set holds from now on; 1 or less leaves guidance out until it is set above 1 again."""
        if scale > 1 and self.negative is None:
            raise ValueError(f"a callback set pipe.guidance_scale to {scale}, but {NEVER_GUIDED}")
        self.guided, self.guidance_at = self.negative is not None and scale > 1, None
        self._join()

    def _take_embeds(self, changed: Mapping[str, paddle.Tensor]) -> None:
        one, embeds = list(self.positive.shape), changed.get("prompt_embeds")
        if embeds is not None:
            both = [2 * one[0], *one[1:]]
            if self.negative is not None and list(embeds.shape) == both:
                self.negative, self.positive = paddle.chunk(embeds, 2)
            elif not self.guided and list(embeds.shape) == one:
                self.positive = embeds
            else:
                wanted = f"{both}, the negative ones first (or set pipe.guidance_scale to 1 as well and return {one})"
                raise ValueError(f"callback_on_step_end returned prompt_embeds {list(embeds.shape)}; the next step "
                                 f"takes {wanted if self.guided else one}")
        negative = changed.get("negative_prompt_embeds")
        if negative is not None:
            if self.negative is None:
                raise ValueError(f"callback_on_step_end returned negative_prompt_embeds, but {NEVER_GUIDED}")
            if list(negative.shape) != one:
                raise ValueError(f"callback_on_step_end returned negative_prompt_embeds {list(negative.shape)}; the next step "
                                 f"takes {one}")
            self.negative = negative
        if changed:
            self._join()

    def _join(self) -> None:
        self.embeds = self.positive
        if self.guided:
            self.embeds = paddle.concat([self.negative.astype(self.positive.dtype), self.positive])

    def guide(self, pipe: Any, predicted: paddle.Tensor, timestep: int) -> paddle.Tensor:
        """The prediction [B, ...] of one with guidance [2B, ...] or without [B, ...]."""
        if self.guidance_at is not None:
            pipe.guidance_scale = self.guidance_at(timestep)
        if not self.guided:
            return predicted
        unguided, prompted = paddle.chunk(predicted, 2)
        return unguided + pipe.guidance_scale * (prompted - unguided)
