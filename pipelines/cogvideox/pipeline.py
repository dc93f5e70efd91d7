"""Text to video with CogVideoX: prompt, denoising with guidance, decoding.

Noise comes from NumPy, one generator per video, so that a seed gives the same starting noise on every device and a video of
a batch can be made again alone. Latents stay float32 between steps whatever the type of the weights.

Source: diffusers 0.42's CogVideoXPipeline (behaviour; own code). What differs: `num_videos_per_prompt` works, seeds, latents
in float32, and shapes that the model cannot serve are refused before the work.
"""
from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from tqdm import tqdm

from ..shared.config import DIFFUSERS_VERSION, ConfigError, read_json, write_json
from ..shared.t5 import T5EncoderModel
from ..shared.t5_tokenizer import T5Tokenizer
from .scheduler import CogVideoXDDIMScheduler, CogVideoXScheduler
from .scheduler_dpm import CogVideoXDPMScheduler
from .transformer import CogVideoXTransformer3DModel
from .vae import AutoencoderKLCogVideoX

MODEL_INDEX_NAME = "model_index.json"
PIPELINE_CLASS = "CogVideoXPipeline"
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
WITHOUT_WEIGHTS = ("scheduler", "tokenizer")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.model"]
OUTPUT_TYPES = ("np", "frames", "pd", "latent")
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
MAX_SEED = 2**32
MAX_FRAME_GAP = 64  # frames within which there is always a number that the VAE makes


@dataclass
class PipelineOutput:
    """What a call returns.

    Args:
        frames: "np": float32 array [B, F, H, W, 3] in [0, 1]; "frames": for each video a list of uint8 arrays [H, W, 3];
            "pd": float32 tensor [B, F, 3, H, W] in [0, 1]; "latent": float32 tensor [B, f, C, h, w].
        timings: seconds of "text_encode", "denoise" and "decode".
        seeds: the seed of each video, where the noise came from seeds.
    """

    frames: Any
    timings: dict[str, float] = field(default_factory=dict)
    seeds: list[int] | None = None


class CogVideoXPipeline:
    """Makes videos of prompts.

    Args:
        tokenizer, text_encoder, transformer, vae, scheduler: the five parts; each can be replaced later.
        device: where the parts are, as Paddle names it ("cpu", "gpu:0"); None: the current device.
    """

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        transformer: CogVideoXTransformer3DModel,
        vae: AutoencoderKLCogVideoX,
        scheduler: CogVideoXScheduler,
        device: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.device = device or paddle.get_device()
        self.interrupt = False  # a callback sets this to stop after the current step
        self.guidance_scale = 1.0  # of the current step
        self.num_timesteps = 0

    # ------------------------------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: str = "float32",
        device: str = "auto",
        variant: str | None = None,
        **components: Any,
    ) -> CogVideoXPipeline:
        """Reads a pipeline's folder in diffusers' layout, or fetches one by its Hugging Face Hub id.

        Args:
            path: a folder with model_index.json, or an id such as "THUDM/CogVideoX-2b" (needs huggingface_hub).
            dtype: of the weights: "float32", "float16", "bfloat16"; a CPU holds them in float32 all the same.
            device: "auto" (the GPU, if Paddle has one, else the CPU), or as Paddle names it.
            variant: the "fp16" of "diffusion_pytorch_model.fp16.safetensors".
            components: parts to use in place of the folder's, such as `scheduler=`.
        Raises:
            FileNotFoundError: no such folder, or a part of it is missing (all are named).
            ConfigError: another pipeline's folder, or a part of another class, or a config key that is not known.
            WeightsError: weight files missing, damaged, or not those of the configuration.
        """
        unknown = sorted(set(components) - set(COMPONENTS))
        if unknown:
            raise TypeError(f"from_pretrained got unknown parts: {', '.join(unknown)}; known: {', '.join(COMPONENTS)}")
        folder = _find_folder(os.fspath(path))
        classes = _read_index(folder, skip=components)
        if device == "auto":
            from lowbit_video.runtime.detect import default_paddle_device

            device = default_paddle_device()
        parts = dict(components)
        with on_device(device):
            for name, part_class in classes.items():
                part_folder = os.path.join(folder, name)
                if name in WITHOUT_WEIGHTS:
                    parts[name] = part_class.from_pretrained(part_folder)
                else:
                    parts[name] = part_class.from_pretrained(part_folder, dtype=dtype, variant=variant)
        return cls(**parts, device=device)

    def save_pretrained(self, folder: str | os.PathLike, dtype: Any = None) -> None:
        """Writes a folder that diffusers' CogVideoXPipeline reads; model_index.json comes last, when all else is there.

        Args:
            folder: made if need be.
            dtype: of the weights on disk; None: as they are in memory.
        """
        folder = os.fspath(folder)
        os.makedirs(folder, exist_ok=True)
        index: dict[str, Any] = {"_class_name": PIPELINE_CLASS, "_diffusers_version": DIFFUSERS_VERSION}
        for name, (library, _) in COMPONENTS.items():
            part = getattr(self, name)
            part_folder = os.path.join(folder, name)
            if name in WITHOUT_WEIGHTS:
                part.save_pretrained(part_folder)
            else:
                part.save_pretrained(part_folder, dtype=dtype)
            index[name] = [library, type(part).__name__]
        write_json(os.path.join(folder, MODEL_INDEX_NAME), index)

    # ------------------------------------------------------------------------------------------------ attention processors

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The transformer's attention processors by name."""
        return self.transformer.attn_processors

    def set_attn_processor(self, processor: Any) -> None:
        """Sets one processor for all attention modules of the transformer, or each its own from a dict by name."""
        self.transformer.set_attn_processor(processor)

    # ------------------------------------------------------------------------------------------------ running

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> paddle.Tensor:
        """Text embeddings [B, max_sequence_length, D] of one prompt or several; a longer prompt is cut, with a warning."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        length = max_sequence_length or self.transformer.config.max_text_seq_length
        for text, ids in zip(prompts, self.tokenizer(prompts).input_ids):
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                warnings.warn(
                    f"the prompt {text[:40]!r}... has {len(ids)} tokens and max_sequence_length is {length}; "
                    f"this part is cut off: {lost!r}",
                    stacklevel=2,
                )
        ids = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
        with on_device(self.device), paddle.no_grad():
            return self.text_encoder(paddle.to_tensor(ids))

    def decode_latents(self, latents: paddle.Tensor, progress: bool = False) -> paddle.Tensor:
        """Video [B, 3, F, H, W] about [-1, 1] of latents [B, f, C, h, w]."""
        total = None if self.vae.use_tiling else latents.shape[0] * latents.shape[1]
        latents = latents.transpose([0, 2, 1, 3, 4]) / self.vae.config.scaling_factor
        with tqdm(total=total, desc="decode", unit="frame", disable=not progress) as bar:
            self.vae.on_decoded = bar.update
            try:
                return self.vae.decode(latents.astype(self.vae.dtype))
            finally:
                self.vae.on_decoded = None

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
        callback_on_step_end: Callable[[CogVideoXPipeline, int, int, dict], Mapping | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = True,
    ) -> PipelineOutput:
        """Makes `num_videos_per_prompt` videos of each prompt.

        Args:
            prompt: one or several; or None with prompt_embeds.
            negative_prompt: what the videos should not show: one for all prompts or one each; "" by default.
            height, width: pixels; the trained size by default.
            num_frames: frames; the trained number by default.
            num_inference_steps: denoising steps.
            guidance_scale: weight of the prompt; 1 or less leaves guidance out and halves the work.
            use_dynamic_cfg: the weight grows along the steps, as published for the DPM scheduler.
            num_videos_per_prompt: videos of each prompt, next to each other in the output.
            eta: must be 0; CogVideoX's schedulers have no use for another value.
            seed: of the first video, the next ones count up from it; or one for each video; None: a new one.
            generator: in place of a seed: one object with `standard_normal(shape)` for all videos or a list of one each.
            latents: starting noise [B, f, C, h, w], in place of drawn noise.
            prompt_embeds, negative_prompt_embeds: [B, N, D], in place of texts; one row per prompt.
            output_type: one of OUTPUT_TYPES; see PipelineOutput.
            max_sequence_length: text tokens; the model's own number by default.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; what it returns under a name
                replaces that tensor.
            callback_on_step_end_tensor_inputs: which of CALLBACK_TENSORS the callback gets; "prompt_embeds" holds the
                negative ones first where there is guidance.
            progress: show progress bars of denoising and decoding.
        Raises:
            ValueError: inputs that do not fit the model or each other, before any work.
        """
        height, width, num_frames = self._resolve_size(height, width, num_frames)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; supported: {', '.join(OUTPUT_TYPES)}")
        if eta:
            raise ValueError(f"eta is {eta}; CogVideoX's schedulers take none. Leave it at 0")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in CALLBACK_TENSORS]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}; supported: {', '.join(CALLBACK_TENSORS)}"
            )
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt is {num_videos_per_prompt}; give at least 1")
        prompts, negatives = _check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        guided = guidance_scale > 1.0
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        self.num_timesteps = len(timesteps)
        self.interrupt = False
        self.guidance_scale = guidance_scale
        timings: dict[str, float] = {}

        with on_device(self.device), paddle.no_grad():
            batch = len(prompts) if prompts is not None else prompt_embeds.shape[0]
            videos = batch * num_videos_per_prompt
            shape, padded_frames = self._latent_shape(videos, num_frames, height, width)
            generators, seeds = _make_generators(seed, generator, videos)
            latents = _draw(generators, shape) if latents is None else _take_latents(latents, shape)
            latents = latents * self.scheduler.init_noise_sigma
            rotary = self.transformer.rotary_tables(shape[1], shape[3], shape[4])

            with self._timed(timings, "text_encode"):
                positive = _given_or(prompt_embeds, lambda: self.encode_prompt(prompts, max_sequence_length))
                embeds = positive = _repeat_rows(positive, num_videos_per_prompt)
                negative = None
                if guided:
                    negative = _given_or(
                        negative_prompt_embeds, lambda: self.encode_prompt(negatives or [""] * batch, max_sequence_length)
                    )
                    negative = _repeat_rows(negative, num_videos_per_prompt)
                    if negative.shape != positive.shape:
                        raise ValueError(
                            f"prompt_embeds make {list(positive.shape)} and negative_prompt_embeds {list(negative.shape)}; "
                            f"they must agree"
                        )
                    embeds = paddle.concat([negative, positive.astype(negative.dtype)])

            before, clean = None, None
            with self._timed(timings, "denoise"), tqdm(total=len(timesteps), desc="denoise", disable=not progress) as bar:
                for step, timestep in enumerate(map(int, timesteps)):
                    model_input = paddle.concat([latents] * 2) if guided else latents
                    model_input = self.scheduler.scale_model_input(model_input, timestep)
                    predicted = self.transformer(
                        model_input,
                        embeds,
                        paddle.full([model_input.shape[0]], timestep, dtype="int64"),
                        image_rotary_emb=rotary,
                    ).astype("float32")
                    if use_dynamic_cfg:
                        self.guidance_scale = dynamic_guidance(guidance_scale, timestep, num_inference_steps)
                    if guided:
                        unguided, prompted = paddle.chunk(predicted, 2)
                        predicted = unguided + self.guidance_scale * (prompted - unguided)
                    if self.scheduler.uses_noise:
                        noise = _draw(generators, shape)
                        latents, clean = self.scheduler.step(predicted, clean, timestep, before, latents, noise=noise)
                    else:
                        latents, clean = self.scheduler.step(predicted, timestep, latents)
                    before = timestep
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
                        given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        changed = callback_on_step_end(self, step, timestep, given) or {}
                        latents = changed.get("latents", latents)
                        embeds = changed.get("prompt_embeds", embeds)
                    bar.update()
                    if self.interrupt:
                        break

            if output_type == "latent":
                return PipelineOutput(latents, timings, seeds)
            with self._timed(timings, "decode"):
                video = self.decode_latents(latents[:, padded_frames:], progress)
                frames = _postprocess(video, output_type)
        return PipelineOutput(frames, timings, seeds)

    def _resolve_size(self, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
        """The size with defaults filled in.

        Raises:
            ValueError: not a size that the model makes; the nearest ones are named.
        """
        config, ratio = self.transformer.config, self.vae.spatial_compression_ratio
        height = config.sample_height * ratio if height is None else height
        width = config.sample_width * ratio if width is None else width
        num_frames = config.sample_frames if num_frames is None else num_frames
        multiple = ratio * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < multiple or size % multiple:
                low = size // multiple * multiple
                nearest = [str(value) for value in (low, low + multiple) if value > 0]
                raise ValueError(f"{name} is {size} and must be a multiple of {multiple}; the nearest: {', '.join(nearest)}")
        if not self._makes_frames(num_frames):
            nearest = [n for n in range(max(num_frames, 0) + MAX_FRAME_GAP) if self._makes_frames(n)]
            nearest = [*[n for n in nearest if n < num_frames][-1:], *[n for n in nearest if n > num_frames][:1]]
            raise ValueError(
                f"num_frames is {num_frames}, which the VAE's groups of frames do not make; the nearest: "
                f"{', '.join(map(str, nearest))}"
            )
        return height, width, num_frames

    def _makes_frames(self, num_frames: int) -> bool:
        return num_frames > 0 and self.vae.num_decoded_frames(self._latent_frames(num_frames)) == num_frames

    def _latent_frames(self, num_frames: int) -> int:
        return (num_frames - 1) // int(self.vae.config.temporal_compression_ratio) + 1

    def _latent_shape(self, videos: int, num_frames: int, height: int, width: int) -> tuple[list[int], int]:
        """Shape of the latents, and how many of its first frames only fill up the transformer's patches in time (1.5)."""
        frames, ratio = self._latent_frames(num_frames), self.vae.spatial_compression_ratio
        padding = -frames % (self.transformer.config.patch_size_t or 1)
        return [videos, frames + padding, self.transformer.config.in_channels, height // ratio, width // ratio], padding

    @contextlib.contextmanager
    def _timed(self, timings: dict[str, float], stage: str) -> Iterator[None]:
        """Adds the seconds that the block takes on the device."""
        start = time.perf_counter()
        yield
        if self.device != "cpu":
            paddle.device.synchronize(self.device)
        timings[stage] = time.perf_counter() - start


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """New tensors go to `device` inside the block."""
    before = paddle.get_device()
    paddle.set_device(device)
    try:
        yield
    finally:
        paddle.set_device(before)


def dynamic_guidance(guidance_scale: float, timestep: int, num_inference_steps: int) -> float:
    """The guidance at a timestep under `use_dynamic_cfg`.

    Source: the original code, in which the timestep (up to 999) is set against the number of steps; kept, as the published
    results were made with it.
    """
    return 1 + guidance_scale * (1 - math.cos(math.pi * ((num_inference_steps - timestep) / num_inference_steps) ** 5.0)) / 2


def _find_folder(path: str) -> str:
    """The folder itself, or a downloaded copy of what a hub id names."""
    if os.path.isdir(path):
        return path
    if not HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"no such folder: {path} (a Hugging Face Hub id has the form owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{path} is not a folder here. To fetch it from the Hugging Face Hub, `pip install huggingface_hub` and run this "
            f"again; or download it elsewhere and give its folder"
        ) from None
    return snapshot_download(path, allow_patterns=HUB_FILES)


def _read_index(folder: str, skip: Mapping[str, Any]) -> dict[str, type]:
    """The class of each part of a folder that is to be read; all problems are found before anything is loaded."""
    path = os.path.join(folder, MODEL_INDEX_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} is not a pipeline: it has no {MODEL_INDEX_NAME}")
    index = read_json(path)
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ConfigError(f"{path} describes a {index.get('_class_name')}, expected a {PIPELINE_CLASS} (text to video)")
    surplus = [key for key, value in index.items() if key not in COMPONENTS and not key.startswith("_") and any(_listed(value))]
    if surplus:
        raise ConfigError(f"{path} has parts that {PIPELINE_CLASS} does not know: {', '.join(surplus)}")
    wanted = {name: known for name, (_, known) in COMPONENTS.items() if name not in skip}
    missing = [name for name in wanted if name not in index or not os.path.isdir(os.path.join(folder, name))]
    if missing:
        raise FileNotFoundError(f"{folder} lacks parts of the pipeline: {', '.join(missing)}")
    classes = {}
    for name, known in wanted.items():
        class_name = _listed(index[name])[-1]
        if class_name not in known:
            raise ConfigError(f"{path}: {name} is a {class_name}; supported: {', '.join(known)}")
        classes[name] = known[class_name]
    return classes


def _listed(value: Any) -> list:
    return value if isinstance(value, list) and value else [value]


def _check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds) -> tuple[list[str] | None, list[str] | None]:
    """Prompts and negative prompts as lists of the same length, None where embeddings or nothing were given."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds" + (", not both" if prompt is not None else ""))
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    prompts = _as_texts("prompt", prompt)
    count = len(prompts) if prompts is not None else prompt_embeds.shape[0]
    negatives = _as_texts("negative_prompt", negative_prompt)
    if negatives is not None and isinstance(negative_prompt, str):
        negatives = negatives * count
    if negatives is not None and len(negatives) != count:
        raise ValueError(f"{len(negatives)} negative prompts for {count} prompts; give one for all or one each")
    return prompts, negatives


def _as_texts(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a string or a non-empty list of strings, got {value!r}")
    return texts


def _make_generators(seed, generator, videos: int) -> tuple[list, list[int] | None]:
    """A noise source for each video, and the seeds where there are any."""
    if generator is not None:
        if seed is not None:
            raise ValueError("give either seed or generator, not both")
        sources = list(generator) if isinstance(generator, (list, tuple)) else [generator] * videos
        if len(sources) != videos:
            raise ValueError(f"{len(sources)} generators for {videos} videos; give one for all or one each")
        if not all(hasattr(source, "standard_normal") for source in sources):
            raise ValueError("generator must have standard_normal(shape), as numpy.random.default_rng(seed) has")
        return sources, None
    if seed is None:
        seed = secrets.randbelow(MAX_SEED)
    seeds = [int(one) for one in seed] if isinstance(seed, (list, tuple)) else [int(seed) + i for i in range(videos)]
    if len(seeds) != videos:
        raise ValueError(f"{len(seeds)} seeds for {videos} videos; give one for the first or one each")
    return [np.random.default_rng(one) for one in seeds], seeds


def _draw(generators: Sequence[Any], shape: Sequence[int]) -> paddle.Tensor:
    """Standard normal noise [B, ...], float32, each video's from its own source."""
    return paddle.to_tensor(np.stack([np.asarray(g.standard_normal(tuple(shape[1:])), np.float32) for g in generators]))


def _take_latents(latents: Any, shape: Sequence[int]) -> paddle.Tensor:
    if list(latents.shape) != list(shape):
        raise ValueError(f"latents have shape {list(latents.shape)}; these videos need {list(shape)}")
    return _here(latents).astype("float32")


def _given_or(tensor: Any, make: Callable[[], paddle.Tensor]) -> paddle.Tensor:
    return make() if tensor is None else _here(tensor)


def _here(x: Any) -> paddle.Tensor:
    """An array or tensor as a tensor on the current device."""
    if not isinstance(x, paddle.Tensor):
        return paddle.to_tensor(x)
    moved = str(x.place) != str(paddle.framework._current_expected_place())
    return paddle.to_tensor(x.astype("float32").numpy()).astype(x.dtype) if moved else x


def _repeat_rows(x: paddle.Tensor, times: int) -> paddle.Tensor:
    """Each row of [B, N, D] `times` times in a row."""
    if times == 1:
        return x
    batch, length, width = x.shape
    return x.unsqueeze(1).expand([batch, times, length, width]).reshape([batch * times, length, width])


def _postprocess(video: paddle.Tensor, output_type: str) -> Any:
    """[B, 3, F, H, W] about [-1, 1] to what `output_type` names."""
    video = paddle.clip(video.astype("float32") * 0.5 + 0.5, 0.0, 1.0)
    if output_type == "pd":
        return video.transpose([0, 2, 1, 3, 4]).contiguous()
    array = np.ascontiguousarray(video.numpy().transpose(0, 2, 3, 4, 1))
    if output_type == "np":
        return array
    return [list(one) for one in (array * 255).round().astype(np.uint8)]
