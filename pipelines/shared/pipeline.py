"""What every pipeline is: parts read from a folder and written to one, attention processors, a compiled transformer."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import paddle

from lowbit_video.runtime.detect import default_paddle_device

from .compiling import compiled
from .config import DIFFUSERS_VERSION, ConfigError, write_json
from .folders import MODEL_INDEX_NAME, find_folder, read_index
from .inputs import here, repeat_rows

WITHOUT_WEIGHTS = ("scheduler", "tokenizer")
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
        parts: one for each of `components`.
    """

    class_name: str  # as model_index.json names it
    components: dict[str, tuple[str, dict[str, type]]]
    """Part -> library as model_index.json names it, and the class of each name that it may have there."""

    def __init__(self, device: str | None, **parts: Any):
        for name, part in parts.items():
            setattr(self, name, part)
        self.device = device or paddle.get_device()
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
        **components: Any,
    ) -> Pipeline:
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
        unknown = sorted(set(components) - set(cls.components))
        if unknown:
            advice = "".join(f"; {ELSEWHERE[name]}" for name in unknown if name in ELSEWHERE)
            raise TypeError(f"from_pretrained got unknown arguments: {', '.join(unknown)}; known: dtype, device, variant and "
                            f"the parts {', '.join(cls.components)}{advice}")
        folder = find_folder(path)
        classes = cls._classes_of(folder, skip=components)
        if device == "auto":
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

    @classmethod
    def _classes_of(cls, folder: str, skip: Mapping[str, Any]) -> dict[str, type]:
        """The class of each part of a folder that is to be read; all problems are found before anything is loaded."""
        path, index = read_index(folder)
        if index.get("_class_name") != cls.class_name:
            raise ConfigError(f"{path} describes a {index.get('_class_name')}, expected a {cls.class_name} (text to video)")
        known = cls.components
        surplus = [key for key, value in index.items() if key not in known and not key.startswith("_") and any(_listed(value))]
        if surplus:
            raise ConfigError(f"{path} has parts that {cls.class_name} does not know: {', '.join(surplus)}")
        wanted = {name: classes for name, (_, classes) in known.items() if name not in skip}
        missing = [name for name in wanted if name not in index or not os.path.isdir(os.path.join(folder, name))]
        if missing:
            raise FileNotFoundError(f"{folder} lacks parts of the pipeline: {', '.join(missing)}")
        found = {}
        for name, classes in wanted.items():
            class_name = _listed(index[name])[-1]
            if not isinstance(class_name, str) or class_name not in classes:
                raise ConfigError(f"{path}: {name} is a {class_name}; supported: {', '.join(classes)}")
            found[name] = classes[class_name]
        return found

    def save_pretrained(self, folder: str | os.PathLike, dtype: Any = None) -> None:
        """Writes a folder that diffusers' pipeline of the same class reads; model_index.json comes last, when all is there.

        Args:
            folder: made if need be.
            dtype: of the weights on disk; None: as they are in memory.
        """
        folder = os.fspath(folder)
        os.makedirs(folder, exist_ok=True)
        index: dict[str, Any] = {"_class_name": self.class_name, "_diffusers_version": DIFFUSERS_VERSION}
        for name, (library, _) in self.components.items():
            part = getattr(self, name)
            part_folder = os.path.join(folder, name)
            if name in WITHOUT_WEIGHTS:
                part.save_pretrained(part_folder)
            else:
                part.save_pretrained(part_folder, dtype=dtype)
            index[name] = [library, type(part).__name__]
        write_json(os.path.join(folder, MODEL_INDEX_NAME), index)

    # ------------------------------------------------------------------------------------------------ the transformer

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The transformer's attention processors by name."""
        return self.transformer.attn_processors

    def set_attn_processor(self, processor: Any) -> None:
        """Sets one processor for all attention modules of the transformer, or each its own from a dict by name."""
        self.transformer.set_attn_processor(processor)

    def compile(self) -> None:
        """Compiles the transformer's blocks with `paddle.jit.to_static`; the first call traces them.

        Processors can be set, applied and removed before and after: the one that is set at the time runs, its calls are
        counted, and its errors come out as in eager mode.
        """
        self.transformer = compiled(self.transformer)

    # ------------------------------------------------------------------------------------------------ for a call

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


def _listed(value: Any) -> list:
    return value if isinstance(value, list) and value else [value]
