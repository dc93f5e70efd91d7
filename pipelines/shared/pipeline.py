"""What every pipeline is: parts read from a folder and written to one, attention processors, a compiled transformer."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import paddle

from lowbit_video.arguments import flag
from lowbit_video.files import write_folder_whole
from lowbit_video.runtime.detect import default_paddle_device

from .compiling import compiled
from .config import DIFFUSERS_VERSION, ConfigError, write_json
from .device_memory import peak_gib, restart_peak
from .folders import MODEL_INDEX_NAME, fetch_parts, find_folder, read_index
from .inputs import here, repeat_rows
from .on_demand import OnDemand

WITHOUT_WEIGHTS = ("scheduler", "tokenizer")
ONE_AT_A_TIME = ("text_encoder", "transformer")
"""The large parts, of which a pipeline with low memory has one at a time on the device."""
FETCHED = "fetch the folder with huggingface_hub.snapshot_download(id, {}=...) and give its path"
ELSEWHERE = {
    "torch_dtype": "torch_dtype is dtype here, such as dtype='float16'", "device_map": "device_map is device here",
    "use_safetensors": "safetensors are all that is read: leave use_safetensors out",
    **{name: f"for {name}: {FETCHED.format(name)}" for name in ("revision", "cache_dir", "token", "local_files_only",
                                                                  "force_download", "proxies")},
}
"""What diffusers' from_pretrained takes, and what to write here."""


class Pipeline:
    """The base of a model's pipeline, which names its parts and says how a video is made of a prompt.

    Args:
        device: where the parts are, as Paddle names it ("cpu", "gpu:0"); None: the current device.
        parts: one for each of `components`; None for one that no call will need.
    """

    class_name: str  # as model_index.json names it
    components: dict[str, tuple[str, dict[str, type]]]
    """Part -> library as model_index.json names it, and the class of each name that it may have there."""

    def __init__(self, device: str | None, **parts: Any):
        for name, part in parts.items():
            setattr(self, name, part)
        self.device = device or paddle.get_device()
        self.on_demand: OnDemand | None = None  # of a pipeline with low memory
        self.parallel: Any = None  # what `lowbit_video.parallelize` makes, where several ranks share the work
        self.interrupt = False  # a callback sets this to stop after the current step
        self.guidance_scale = 1.0  # of the current step; a callback may set it for those that follow
        self.num_timesteps = 0

    # ------------------------------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: str = "float32",
        device: str = "auto",
        variant: str | None = None,
        low_memory: bool = False,
        **components: Any,
    ) -> Pipeline:
        """Reads a pipeline's folder in diffusers' layout, or fetches one by its Hugging Face Hub id.

        Args:
            path: a folder with model_index.json, or an id such as "THUDM/CogVideoX-2b" (needs huggingface_hub), of which no
                more is fetched than is read.
            dtype: of the weights: "float32", "float16", "bfloat16"; a CPU holds them in float32 all the same.
            device: "auto" (the GPU, if Paddle has one, else the CPU), or as Paddle names it.
            variant: the "fp16" of "diffusion_pytorch_model.fp16.safetensors".
            low_memory: the text encoder and the transformer have their weights on the device one at a time, while a call needs
                them, and read them from the files each time; the VAE decodes videos of a batch one by one and, where what is
                free on the device does not do, by tiles, unless its own switches were set. Parts given as `components` stay.
            components: parts to use in place of the folder's, such as `scheduler=`; None leaves one out, as in
                `text_encoder=None` where every call gets embeddings.
        Raises:
            FileNotFoundError: no such folder, nothing to be had by that id, or a part is missing (all are named).
            ConfigError: another pipeline's folder, or a part of another class, or a config key that is not known.
            WeightsError: weight files missing, damaged, or not those of the configuration.
        """
        low_memory = flag("low_memory", low_memory)
        unknown = sorted(set(components) - set(cls.components))
        if unknown:
            advice = "".join(f"; {ELSEWHERE[name]}" for name in unknown if name in ELSEWHERE)
            raise TypeError(f"from_pretrained got unknown arguments: {', '.join(unknown)}; known: dtype, device, variant, "
                            f"low_memory and the parts {', '.join(cls.components)}{advice}")
        folder = find_folder(path)
        classes = cls._classes_of(folder, skip=components)
        folder = fetch_parts(path, folder, classes, variant)
        missing = [name for name in classes if not os.path.isdir(os.path.join(folder, name))]
        if missing:
            raise FileNotFoundError(f"{folder} lacks parts of the pipeline: {', '.join(missing)}; what no call will need is "
                                    f"left out as in {missing[0]}=None")
        if device == "auto":
            device = default_paddle_device()
        parts = dict(components)
        with on_device(device):
            for name, part_class in classes.items():
                part_folder = os.path.join(folder, name)
                if name in WITHOUT_WEIGHTS:
                    parts[name] = part_class.from_pretrained(part_folder)
                else:
                    later = low_memory and name in ONE_AT_A_TIME
                    parts[name] = part_class.from_pretrained(part_folder, dtype=dtype, variant=variant, read=not later)
        pipe = cls(**{**dict.fromkeys(cls.components), **parts}, device=device)
        if low_memory:
            pipe.on_demand = OnDemand(device, [parts[name] for name in ONE_AT_A_TIME if name in classes])
        return pipe

    @classmethod
    def _classes_of(cls, folder: str, skip: Mapping[str, Any]) -> dict[str, type]:
        """The class of each part that is to be read, as model_index.json has it; what it calls null is left out."""
        path, index = read_index(folder)
        if index.get("_class_name") != cls.class_name:
            raise ConfigError(f"{path} describes a {index.get('_class_name')}, expected a {cls.class_name} (text to video)")
        known = cls.components
        surplus = [key for key, value in index.items() if key not in known and not key.startswith("_") and any(_listed(value))]
        if surplus:
            raise ConfigError(f"{path} has parts that {cls.class_name} does not know: {', '.join(surplus)}")
        wanted = {name: classes for name, (_, classes) in known.items() if name not in skip}
        missing = [name for name in wanted if name not in index]
        if missing:
            raise FileNotFoundError(f"{path} lacks parts of the pipeline: {', '.join(missing)}")
        found = {}
        for name, classes in wanted.items():
            class_name = _listed(index[name])[-1]
            if class_name is None:
                continue
            if not isinstance(class_name, str) or class_name not in classes:
                raise ConfigError(f"{path}: {name} is a {class_name}; supported: {', '.join(classes)}")
            found[name] = classes[class_name]
        return found

    def save_pretrained(self, folder: str | os.PathLike, dtype: Any = None) -> None:
        """Writes a folder that diffusers' pipeline of the same class reads, all of it or nothing.

        Where `folder` is there already, a part's folder in it is replaced as a whole and other files stay. A part that the
        pipeline was made without is null in model_index.json, as diffusers writes it (and reads it where it is told so again:
        `text_encoder=None`).

        diffusers asks for 226 text tokens unless told otherwise; of a model that takes another number, tell it:
        `pipe(..., max_sequence_length=transformer.config["max_text_seq_length"])` (the small model: 32).

        Args:
            folder: made if need be.
            dtype: of the weights on disk; None: as they are in memory.
        """
        index: dict[str, Any] = {"_class_name": self.class_name, "_diffusers_version": DIFFUSERS_VERSION}
        with write_folder_whole(folder) as temporary:
            for name, (library, _) in self.components.items():
                part = getattr(self, name)
                if part is None:
                    index[name] = [None, None]
                    continue
                with self._needed(name, now=True):
                    part.save_pretrained(temporary / name, **({} if name in WITHOUT_WEIGHTS else {"dtype": dtype}))
                index[name] = [library, type(part).__name__]
            write_json(temporary / MODEL_INDEX_NAME, index)

    # ------------------------------------------------------------------------------------------------ the transformer

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The transformer's attention processors by name."""
        return self._part("transformer", "attention processors").attn_processors

    def set_attn_processor(self, processor: Any) -> None:
        """Sets one processor for all attention modules of the transformer, or each its own from a dict by name."""
        self._part("transformer", "attention processors").set_attn_processor(processor)

    def compile(self) -> None:
        """Compiles the transformer's blocks with `paddle.jit.to_static`; the first call traces them.

        Processors can be set, applied and removed before and after: the one that is set at the time runs, its calls are
        counted, and its errors come out as in eager mode.
        """
        self.transformer = compiled(self._part("transformer", "compile()"))

    # ------------------------------------------------------------------------------------------------ for a call

    def _part(self, name: str, user: str, instead: str = "") -> Any:
        """A part. ValueError, where the pipeline was made without it. user: what needs it. instead: what else would do."""
        part = getattr(self, name)
        if part is None:
            raise ValueError(f"{user} needs the pipeline's {name}, which is None: it was left out. {instead}Load the pipeline "
                             f"with it, or set it: pipe.{name} = ...")
        return part

    def _needed(self, name: str, now: bool = False) -> contextlib.AbstractContextManager:
        """A block that needs the weights of a part: of a pipeline with low memory they are there only meanwhile.

        now: from the beginning of the block, not only from when the part is called.
        """
        return contextlib.nullcontext() if self.on_demand is None else self.on_demand.needed(getattr(self, name), now)

    def _check_parts(self, prompts, negatives, negative_prompt_embeds, guidance_scale: float, output_type: str) -> None:
        """Raises ValueError where a call needs a part that the pipeline was made without."""
        for name in ("transformer", "scheduler"):
            self._part(name, "a call")
        if output_type != "latent":
            self._part("vae", f"output_type {output_type!r}", "Give output_type='latent'. ")
        for name in ("tokenizer", "text_encoder"):
            if prompts is not None:
                self._part(name, "the prompt", "Give prompt_embeds in its place. ")
            if guidance_scale > 1 and negative_prompt_embeds is None:
                text = "the negative prompt" if negatives else f"the empty negative prompt of guidance_scale {guidance_scale:g}"
                self._part(name, text, "Give negative_prompt_embeds, or guidance_scale=1 for a video without guidance. ")

    def _shared(self, tensor: paddle.Tensor) -> paddle.Tensor:
        """The tensor, on several ranks that of rank 0."""
        return tensor if self.parallel is None else self.parallel.shared(tensor)

    def _of_rank_0(self, value: Any) -> Any:
        """The value (what JSON can hold), on several ranks that of rank 0."""
        return value if self.parallel is None else self.parallel.values(value)[0]

    def _check_ranks(self, **settings: Any) -> None:
        """Raises ValueError where other ranks called the pipeline with other settings."""
        if self.parallel is not None:
            self.parallel.check_same(settings, "the pipeline")

    def shows(self, progress: bool) -> bool:
        """Whether this process shows progress: on several ranks, rank 0 does."""
        return progress and (self.parallel is None or self.parallel.rank == 0)

    def interrupted(self) -> bool:
        """Whether to stop: whether `interrupt` is set, on any rank."""
        if self.parallel is not None:
            self.interrupt = any(self.parallel.values(bool(self.interrupt)))
        return self.interrupt

    def _embed(self, prompts, negatives, prompt_embeds, negative_prompt_embeds, guided: bool, times: int, length: int | None):
        """Embeddings for the model of texts or given embeddings, each row `times` times; where `guided`, negative ones first.

        Given embeddings say how many tokens a negative text gets.
        """
        if prompt_embeds is not None and length not in (None, prompt_embeds.shape[1]):
            raise ValueError(f"max_sequence_length is {length} and prompt_embeds has {prompt_embeds.shape[1]} tokens; leave "
                             "max_sequence_length out")
        length = length if prompt_embeds is None else prompt_embeds.shape[1]
        encode = lambda texts: self.encode_prompt(texts, length)
        positive = repeat_rows(encode(prompts) if prompt_embeds is None else here(prompt_embeds, "prompt_embeds"), times)
        if not guided:
            return positive
        if negative_prompt_embeds is None:
            negative = encode(negatives or [""] * (positive.shape[0] // times))
        else:
            negative = here(negative_prompt_embeds, "negative_prompt_embeds")
        negative = repeat_rows(negative, times)
        if negative.shape != positive.shape:
            raise ValueError(
                f"prompt_embeds make {list(positive.shape)} and negative_prompt_embeds {list(negative.shape)}; they must agree"
            )
        return paddle.concat([negative, positive.astype(negative.dtype)])

    @contextlib.contextmanager
    def _stage(self, stage: str, timings: dict[str, float], memory: dict[str, float]) -> Iterator[None]:
        """Notes the seconds that the block takes on the device and, where the device tells, the most memory in it, GiB."""
        restart_peak(self.device)
        start = time.perf_counter()
        yield
        if self.device != "cpu":
            paddle.device.synchronize(self.device)
        timings[stage] = time.perf_counter() - start
        if (peak := peak_gib(self.device)) is not None:
            memory[stage] = peak


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """New tensors go to `device` inside the block."""
    before = paddle.get_device()
    paddle.set_device(device)
    try:
        yield
    finally:
        paddle.set_device(before)


def _listed(value: Any) -> list:
    return value if isinstance(value, list) and value else [value]
