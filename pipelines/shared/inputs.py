"""What a caller gives a pipeline, checked and made ready: prompts, seeds or noise sources, latents, embeddings."""
from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from lowbit_video.arguments import shown, whole
from lowbit_video.errors import NonFiniteError

MAX_SEED = 2**32
MAX_ELEMENTS = 2**31 - 1
"""Of one tensor: what an int32 counts."""
FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, width: int
                  ) -> tuple[list[str] | None, list[str] | None]:
    """Prompts and negative prompts as lists of the same length, None where embeddings [B, N, width] or nothing were given."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds" + (", not both" if prompt is not None else ""))
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    prompts = as_texts("prompt", prompt)
    for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
        if embeds is not None:
            check_tensor(embeds, name)
            if len(embeds.shape) != 3 or 0 in embeds.shape or embeds.shape[2] != width:
                raise ValueError(f"{name} has shape {list(embeds.shape)}; this model takes [prompts, tokens, {width}]")
            check_finite(embeds, name)
    count = len(prompts) if prompts is not None else prompt_embeds.shape[0]
    negatives = as_texts("negative_prompt", negative_prompt)
    if negatives is not None and isinstance(negative_prompt, str):
        negatives = negatives * count
    if negatives is not None and len(negatives) != count:
        raise ValueError(f"{len(negatives)} negative prompts for {count} prompts; give one for all or one each")
    return prompts, negatives


def size_or_none(name: str, value: Any, least: int | None = None) -> int | None:
    """A whole number of what memory must hold, or None as given. TypeError or ValueError for anything else."""
    return None if value is None else whole(name, value, least, MAX_ELEMENTS)


def as_texts(name: str, value: Any) -> list[str] | None:
    """One text or several as a list; ValueError for anything else but None."""
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a string or a non-empty list of strings, got {shown(value)}")
    return texts


def make_generators(seed, generator, videos: int) -> tuple[list, list[int] | None]:
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
    if isinstance(seed, (list, tuple)) or getattr(seed, "shape", ()) != ():
        seeds = [whole("seed", one, 0) for one in seed]
    else:
        seeds = [whole("seed", seed, 0) + i for i in range(videos)]
    if len(seeds) != videos:
        raise ValueError(f"{len(seeds)} seeds for {videos} videos; give one for the first or one each")
    return [np.random.default_rng(one) for one in seeds], seeds


def draw(generators: Sequence[Any], shape: Sequence[int]) -> paddle.Tensor:
    """Standard normal noise [B, ...], float32, each video's from its own source."""
    noise = [np.asarray(g.standard_normal(tuple(shape[1:])), np.float32) for g in generators]
    wrong = [list(one.shape) for one in noise if one.shape != tuple(shape[1:])]
    if wrong:
        raise ValueError(f"generator.standard_normal({tuple(shape[1:])}) gave shape {wrong[0]}; give that shape")
    return paddle.to_tensor(np.stack(noise))


def take_latents(latents: Any, shape: Sequence[int]) -> paddle.Tensor:
    """The caller's latents, float32, on the current device. ValueError for another shape."""
    latents = here(latents, "latents")
    if list(latents.shape) != list(shape):
        raise ValueError(f"latents have shape {list(latents.shape)}; these videos need {list(shape)}")
    return latents.astype("float32")


def check_tensor(x: Any, name: str) -> None:
    """Raises TypeError for what is no Paddle tensor or NumPy array of floats; a torch tensor is told how to become one."""
    if not isinstance(x, (paddle.Tensor, np.ndarray)):
        kind = type(x)
        advice = {"torch": f"{name}.detach().float().cpu().numpy()", "builtins": f"np.stack({name})"}.get(
            kind.__module__.split(".")[0], f"np.asarray({name})")
        raise TypeError(f"{name} is a {kind.__module__}.{kind.__qualname__}; supported: a Paddle tensor or a NumPy array; try "
                        f"{advice}")
    dtype = str(x.dtype).split(".")[-1]
    if dtype not in FLOATS or (dtype == "bfloat16" and isinstance(x, np.ndarray)):
        raise TypeError(f"{name} has dtype {dtype}; supported: {', '.join(FLOATS)} (an array has no bfloat16); try "
                        f"{name}.astype('float32')")


def check_finite(x: Any, name: str) -> None:
    """Raises NonFiniteError for a tensor or an array with NaN or infinity: the work would be for nothing."""
    finite = int(np.isfinite(x).sum() if isinstance(x, np.ndarray) else paddle.isfinite(x).astype("int64").sum())
    if finite != x.size:
        raise NonFiniteError(f"{name} has {x.size - finite} NaN or infinite elements of {x.size} (shape {list(x.shape)}); find "
                             "where they come from")


def here(x: Any, name: str) -> paddle.Tensor:
    """An array or tensor as a tensor on the current device. TypeError as `check_tensor`."""
    check_tensor(x, name)
    if not isinstance(x, paddle.Tensor):
        return paddle.to_tensor(x)
    moved = str(x.place) != str(paddle.framework._current_expected_place())
    return paddle.to_tensor(x.astype("float32").numpy()).astype(x.dtype) if moved else x


def repeat_rows(x: paddle.Tensor, times: int) -> paddle.Tensor:
    """Each row of [B, N, D] `times` times in a row."""
    if times == 1:
        return x
    batch, length, width = x.shape
    return x.unsqueeze(1).expand([batch, times, length, width]).reshape([batch * times, length, width])
