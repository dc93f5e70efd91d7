"""Text to video with CogVideoX: prompt, denoising with guidance, decoding.

Noise comes from NumPy, one generator per video, so that a seed gives the same starting noise on every device and a video of
a batch can be made again alone. Latents stay float32 between steps whatever the type of the weights.

Source: diffusers 0.42's CogVideoXPipeline (behaviour; own code). What differs: `num_videos_per_prompt` works, seeds, latents
in float32, and shapes that the model cannot serve are refused before the work.
"""
from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import paddle
from tqdm import tqdm

from lowbit_video.arguments import flag, number, shown, whole
from lowbit_video.distributed.cost.models import default_size
from lowbit_video.hook.order import order_of

from ..shared.conditions import CALLBACK_TENSORS, Callback, guidance
from ..shared.denoise import denoise
from ..shared.device_memory import free_bytes
from ..shared.inputs import (
    MAX_ELEMENTS,
    as_texts,
    check_prompts,
    check_tensor,
    draw,
    here,
    make_generators,
    size_or_none,
    take_latents,
)
from ..shared.output import OUTPUT_TYPES, PipelineOutput, postprocess
from ..shared.pipeline import Pipeline, on_device
from ..shared.t5 import T5EncoderModel
from ..shared.t5_tokenizer import T5Tokenizer
from ..shared.turns import one_at_a_time
from .scheduler import CogVideoXDDIMScheduler, CogVideoXScheduler
from .scheduler_dpm import CogVideoXDPMScheduler
from .transformer import CogVideoXTransformer3DModel
from .vae import AutoencoderKLCogVideoX
from .vae_room import within

# component -> library as model_index.json names it, and the class of each name that it may have there
COMPONENTS: dict[str, tuple[str, dict[str, type]]] = {
    "scheduler": (
        "diffusers",
        {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": CogVideoXDPMScheduler},
    ),
    "tokenizer": ("transformers", {"T5Tokenizer": T5Tokenizer, "T5TokenizerFast": T5Tokenizer}),
    "text_encoder": ("transformers", {"T5EncoderModel": T5EncoderModel}),
    "transformer": ("diffusers", {"CogVideoXTransformer3DModel": CogVideoXTransformer3DModel}),
    "vae": ("diffusers", {"AutoencoderKLCogVideoX": AutoencoderKLCogVideoX}),
}
MAX_FRAME_GAP = 64  # frames within which there is always a number that the VAE makes


class CogVideoXPipeline(Pipeline):
    """Makes videos of prompts.

    Args:
        tokenizer, text_encoder, transformer, vae, scheduler: the five parts; each can be replaced later, and is None where no
            call needs it: the first two where embeddings are given, the VAE where latents are what is made.
        device: where the parts are, as Paddle names it ("cpu", "gpu:0"); None: the current device.
    """

    class_name = "CogVideoXPipeline"
    components = COMPONENTS

    def __init__(
        self,
        tokenizer: T5Tokenizer | None,
        text_encoder: T5EncoderModel | None,
        transformer: CogVideoXTransformer3DModel | None,
        vae: AutoencoderKLCogVideoX | None,
        scheduler: CogVideoXScheduler | None,
        device: str | None = None,
    ):
        super().__init__(
            device, tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler
        )

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> paddle.Tensor:
        """Text embeddings [B, max_sequence_length, D] of one prompt or several; a longer prompt is cut, with a warning."""
        prompts = as_texts("prompt", [] if prompt is None else prompt)
        tokenizer, text_encoder = (self._part(name, "encode_prompt") for name in ("tokenizer", "text_encoder"))
        length = size_or_none("max_sequence_length", max_sequence_length, 1) or self._part(
            "transformer", "encode_prompt", "Give max_sequence_length (the published models: 226). ").config.max_text_seq_length
        for text, ids in zip(prompts, tokenizer(prompts).input_ids):
            if len(ids) > length:
                lost = tokenizer.decode(ids[length - 1 : -1])
                warnings.warn(
                    f"the prompt {text[:40]!r}... has {len(ids)} tokens and max_sequence_length is {length}; "
                    f"this part is cut off: {lost!r}",
                    stacklevel=2,
                )
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        with on_device(self.device), paddle.no_grad(), self._needed("text_encoder"):
            return text_encoder(paddle.to_tensor(ids))

    def decode_latents(self, latents: paddle.Tensor, progress: bool = False) -> paddle.Tensor:
        """Video [B, 3, F, H, W] about [-1, 1] of latents [B, f, C, h, w]; on several ranks, each gets it.

        Raises ValueError or TypeError for what are no latents of this model, or where the pipeline has no VAE.
        """
        channels = self._part("vae", "decode_latents").config.latent_channels
        check_tensor(latents, "latents")
        if len(latents.shape) != 5 or 0 in latents.shape or latents.shape[2] != channels:
            raise ValueError(f"latents have shape {list(latents.shape)}; this model decodes [videos, frames, {channels}, "
                             "height, width]")
        latents = here(latents, "latents")
        if self.on_demand is not None and self.parallel is None:  # ranks must agree on tiles, and have memory between them
            with within(self.vae, latents.shape, self.vae.parameters()[0].element_size(), free_bytes(self.device)):
                return self._decode(latents, progress)
        if self.parallel is None:
            return self._decode(latents, progress)
        return self.parallel.decode(lambda: self._decode(latents, progress))

    def _decode(self, latents: paddle.Tensor, progress: bool) -> paddle.Tensor:
        total = None if self.vae.use_tiling else latents.shape[0] * latents.shape[1]
        latents = latents.transpose([0, 2, 1, 3, 4]) / self.vae.config.scaling_factor
        with tqdm(total=total, desc="decode", unit="frame", disable=not self.shows(progress)) as bar:
            return self.vae.decode(latents.astype(self.vae.dtype), on_decoded=bar.update)

    @one_at_a_time
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "np",
        max_sequence_length: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = True,
    ) -> PipelineOutput:
        """Makes `num_videos_per_prompt` videos of each prompt.

        Threads that share a pipeline or a scheduler take turns. On several ranks (`lowbit_video.parallelize`) each must call
        this with the same arguments; noise, embeddings and seeds are those of rank 0.

        Args:
            prompt: one or several; or None with prompt_embeds.
            negative_prompt: what the videos should not show: one for all prompts or one each; "" by default.
            height, width: pixels; the trained size by default, of CogVideoX 1.5 the published 768 x 1360.
            num_frames: frames; the trained number by default. The model's own are 8 n + 1; 8 n are made too, with a warning.
            num_inference_steps: denoising steps; of a number that does not divide the schedule see `scheduler.exact_steps`.
            guidance_scale: weight of the prompt; 1 or less leaves guidance out and halves the work. A callback switches it off
                half-way: `pipeline.guidance_scale = 1.0`.
            use_dynamic_cfg: the weight oscillates along the steps, between 1 and itself plus 1, as published for the DPM
                scheduler.
            num_videos_per_prompt: videos of each prompt, next to each other in the output.
            eta: must be 0; CogVideoX's schedulers have no use for another value.
            seed: of the first video, the next ones count up from it; or one for each video; None: a new one.
            generator: in place of a seed: one object with `standard_normal(shape)` for all videos or a list of one each.
            latents: starting noise [B, f, C, h, w], in place of drawn noise; no seeds are reported then. A seed or generator
                beside it is for schedulers that add noise at their steps.
            prompt_embeds, negative_prompt_embeds: [B, N, D], in place of texts; one row per prompt.
            output_type: one of OUTPUT_TYPES; see PipelineOutput.
            max_sequence_length: text tokens; the model's own number by default.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; what it returns under a name
                replaces that tensor from the next step on, and so does a `pipeline.guidance_scale` that it sets.
            callback_on_step_end_tensor_inputs: which of CALLBACK_TENSORS the callback gets; "prompt_embeds" holds the
                negative ones first where there is guidance. A callback that switches guidance off may return the second half.
            progress: show progress bars of denoising and decoding; on several ranks, rank 0 does.
        Raises:
            ValueError, TypeError: inputs that do not fit the model or each other, before any work.
        Warns of inputs that change nothing, such as a negative prompt without guidance.
        """
        num_inference_steps, num_videos_per_prompt = (whole(name, value, 1) for name, value in (
            ("num_inference_steps", num_inference_steps), ("num_videos_per_prompt", num_videos_per_prompt)))
        guidance_scale = guidance("guidance_scale", guidance_scale)
        use_dynamic_cfg, progress = flag("use_dynamic_cfg", use_dynamic_cfg), flag("progress", progress)
        max_sequence_length = size_or_none("max_sequence_length", max_sequence_length, 1)
        _check_choices(output_type, eta, callback_on_step_end, callback_on_step_end_tensor_inputs)
        prompts, negatives = check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
                                           self._part("transformer", "a call").config.text_embed_dim)
        self._check_parts(prompts, negatives, negative_prompt_embeds, guidance_scale, output_type)
        height, width, num_frames = self._resolve_size(height, width, num_frames)
        _warn_of_no_effect(guidance_scale > 1, any(negatives or ()) or negative_prompt_embeds is not None, use_dynamic_cfg,
                           seed is not None and latents is not None and not self.scheduler.uses_noise)
        self._check_ranks(
            prompt=prompts, negative_prompt=negatives, height=height, width=width, num_frames=num_frames,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, use_dynamic_cfg=use_dynamic_cfg,
            num_videos_per_prompt=num_videos_per_prompt, max_sequence_length=max_sequence_length,
            latents_only=output_type == "latent", token_order=order_of(self.transformer))
        self.scheduler.set_timesteps(num_inference_steps)
        self.interrupt, self.guidance_scale, self.num_timesteps = False, guidance_scale, len(self.scheduler.timesteps)
        dynamic = lambda timestep: dynamic_guidance(guidance_scale, timestep, num_inference_steps)
        timings, memory = {}, {}

        with on_device(self.device), paddle.no_grad():
            videos = (len(prompts) if prompts is not None else prompt_embeds.shape[0]) * num_videos_per_prompt
            shape, padded_frames = self._latent_shape(videos, num_frames, height, width)
            generators, seeds = make_generators(seed, generator, videos)
            seeds = self._of_rank_0(None if latents is not None else seeds)
            latents = draw(generators, shape) if latents is None else take_latents(latents, shape)
            latents = self._shared(latents * self.scheduler.init_noise_sigma)
            rotary = self.transformer.rotary_tables(shape[1], shape[3], shape[4])
            with self._stage("text_encode", timings, memory), self._needed("text_encoder"):
                embeds = self._shared(self._embed(prompts, negatives, prompt_embeds, negative_prompt_embeds,
                                                  guidance_scale > 1.0, num_videos_per_prompt, max_sequence_length))
            with self._stage("denoise", timings, memory), self._needed("transformer"):
                latents = denoise(
                    self, lambda *inputs: self.transformer(*inputs, image_rotary_emb=rotary), latents, embeds,
                    guided=guidance_scale > 1.0, draw=lambda: self._shared(draw(generators, shape)),
                    guidance_at=dynamic if use_dynamic_cfg else None,
                    callback=callback_on_step_end, callback_tensors=callback_on_step_end_tensor_inputs, progress=progress,
                )
            if output_type != "latent":
                with self._stage("decode", timings, memory):
                    latents = postprocess(self.decode_latents(latents[:, padded_frames:], progress), output_type)
        return PipelineOutput(latents, timings, seeds, memory)

    def _check_parts(self, *call: Any) -> None:
        super()._check_parts(*call)
        _check_scheduler(self.scheduler)

    def _resolve_size(self, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
        """The size with defaults filled in; warns of a number of frames that the model was not trained for.

        Raises:
            ValueError: not a size that the model makes; the nearest ones are named.
        """
        height, width, num_frames = (size_or_none(name, value) for name, value in (
            ("height", height), ("width", width), ("num_frames", num_frames)))
        config, vae = self.transformer.config, self._measures
        ratio = vae.spatial_compression_ratio
        default_height, default_width = default_size(config, ratio)
        height = default_height if height is None else height
        width = default_width if width is None else width
        num_frames = config.sample_frames if num_frames is None else num_frames
        multiple = ratio * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                low = size // multiple * multiple
                nearest = [str(value) for value in (low, low + multiple) if value > 0]
                raise ValueError(f"{name} is {size} and must be a multiple of {multiple}; the nearest: {', '.join(nearest)}")
        if height * width * num_frames > MAX_ELEMENTS:
            raise ValueError(f"height {height}, width {width} and num_frames {num_frames} make {height * width * num_frames} "
                             f"pixels a video; give at most {MAX_ELEMENTS}")
        step = int(vae.config.temporal_compression_ratio) * vae.num_latent_frames_batch_size
        advice = f"the model's own numbers are {step} n + 1: try {max(1, (num_frames + step // 2 - 1) // step) * step + 1}"
        if not self._makes_frames(num_frames):
            about = range(max(num_frames - MAX_FRAME_GAP, 0), max(num_frames, 0) + MAX_FRAME_GAP)
            nearest = [n for n in about if self._makes_frames(n)]
            nearest = [*[n for n in nearest if n < num_frames][-1:], *[n for n in nearest if n > num_frames][:1]]
            raise ValueError(
                f"num_frames is {num_frames}, which the VAE's groups of frames do not make; the nearest: "
                f"{', '.join(map(str, nearest))}; {advice}"
            )
        if (num_frames - 1) % step and num_frames != config.sample_frames:
            warnings.warn(f"num_frames is {num_frames}, whose first frames come out frozen; {advice}", stacklevel=3)
        return height, width, num_frames

    def _makes_frames(self, num_frames: int) -> bool:
        return num_frames > 0 and self._measures.num_decoded_frames(self._latent_frames(num_frames)) == num_frames

    def _latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // int(self._measures.config.temporal_compression_ratio) + 1

    @property
    def _measures(self) -> AutoencoderKLCogVideoX:
        """The VAE as what says how large latents are: without one, the published models'."""
        return _published_vae() if self.vae is None else self.vae

    def _latent_shape(self, videos: int, num_frames: int, height: int, width: int) -> tuple[list[int], int]:
        """Shape of the latents, and how many of its first frames only fill up the transformer's patches in time (1.5)."""
        frames, ratio = self._latent_frames(num_frames), self._measures.spatial_compression_ratio
        padding = -frames % (self.transformer.config.patch_size_t or 1)
        shape = [videos, frames + padding, self.transformer.config.in_channels, height // ratio, width // ratio]
        if math.prod(shape) > MAX_ELEMENTS:
            raise ValueError(f"{videos} videos (prompts times num_videos_per_prompt) need latents {shape}, more than "
                             f"{MAX_ELEMENTS} numbers; make fewer in a call")
        return shape, padding


@functools.cache
def _published_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_config({})  # without memory for its weights


def _check_choices(output_type: str, eta: float, callback: Any, callback_tensors: Sequence[str]) -> None:
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {shown(output_type)}; supported: {', '.join(OUTPUT_TYPES)}")
    if number("eta", eta):
        raise ValueError(f"eta is {shown(eta)}; CogVideoX's schedulers take none. Leave it at 0")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end is {shown(callback)}; give what can be called as (pipeline, step, timestep, "
                        "tensors), or None")
    if not isinstance(callback_tensors, (list, tuple)):
        raise TypeError(f"callback_on_step_end_tensor_inputs is {shown(callback_tensors)}; give a list of "
                        f"{', '.join(CALLBACK_TENSORS)}")
    unknown = [shown(name) for name in callback_tensors if not isinstance(name, str) or name not in CALLBACK_TENSORS]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; supported: {', '.join(CALLBACK_TENSORS)}"
        )


def _check_scheduler(scheduler: Any) -> None:
    """Raises TypeError for a scheduler of another library: its steps mean other things."""
    if not isinstance(scheduler, CogVideoXScheduler):
        known = "CogVideoXDDIMScheduler, CogVideoXDPMScheduler"
        raise TypeError(f"the pipeline's scheduler is a {type(scheduler).__module__}.{type(scheduler).__qualname__}; "
                        f"supported: {known} of lowbit_video.pipelines; try "
                        "CogVideoXDDIMScheduler.from_config(scheduler.config)")


def _warn_of_no_effect(guided: bool, negative: bool, dynamic: bool, seed: bool) -> None:
    """Warns of what of a call changes nothing. seed: one beside latents, where no step adds noise."""
    off = "has no effect: guidance_scale is 1 or less, which leaves guidance out"
    notes = [(negative and not guided, f"the negative prompt {off}"), (dynamic and not guided, f"use_dynamic_cfg {off}"),
             (seed, "seed has no effect: latents are given, and this scheduler adds no noise")]
    for holds, note in notes:
        if holds:
            warnings.warn(note, stacklevel=3)


def dynamic_guidance(guidance_scale: float, timestep: int, num_inference_steps: int) -> float:
    """The guidance at a timestep under `use_dynamic_cfg`: it oscillates between 1 and 1 + guidance_scale, ever slower.

    Source: the original code, in which the timestep (up to 999) is set against the number of steps; kept, as the published
    results were made with it.
    """
    return 1 + guidance_scale * (1 - math.cos(math.pi * ((num_inference_steps - timestep) / num_inference_steps) ** 5.0)) / 2
