"""A whole step of a CogVideoX transformer on several GPUs: one forward of both halves of guidance, beside one GPU."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lowbit_video import Recipe, apply, denoising_step, parallelize
from lowbit_video.precision import names_recipe

from ..cogvideox import LATENTS
from .clock import Clock
from .models import paddle_transformer, torch_transformer

ROUNDS = 5
AHEAD_PASSES = 8
TEXT_TOKENS, TEXT_CHANNELS = 226, 4096


def splits(size: int) -> dict[str, dict[str, int]]:
    """The ways to share a step among so many ranks, by name."""
    found = {}
    for cfg in (1, 2):
        for ulysses in range(1, size + 1):
            if size % (cfg * ulysses) == 0:
                ring = size // cfg // ulysses
                parts = {"cfg": cfg, "ulysses": ulysses, "ring": ring}
                name = " x ".join(f"{kind}{degree}" for kind, degree in parts.items() if degree > 1)
                found[name] = parts
    return found


def measure(model_name: str, precision: str, framework: str, wire: Any, clock: Clock, say: Callable[[str], None],
            exchange: str = "auto", output: str = "16bit") -> dict[str, Any]:
    """Times of a step by every split, in turns, bytes, and how far each is from one GPU's prediction.

    precision: or a recipe's file or name, of which the step is that at half of the denoising.
    """
    runtime = clock.runtime
    model = (torch_transformer if framework == "torch" else paddle_transformer)(model_name)
    recipe = names_recipe(precision)
    apply(model, Recipe.load(precision) if recipe else precision)
    rng = np.random.default_rng(0)
    frames, height, width = LATENTS[model_name]
    normal = lambda *shape: runtime.from_numpy(rng.standard_normal(shape).astype(np.float32), clock.like, "float16")
    latents, text = normal(2, frames, 16, height, width), normal(2, TEXT_TOKENS, TEXT_CHANNELS)
    step = _step(model, framework, latents, text, runtime, clock.like)
    ways = {"one": None, **splits(wire.size)}
    outs, sent = {}, {}

    @contextlib.contextmanager
    def shared(name: str) -> Iterator[None]:
        half = denoising_step(model, 1, 2) if recipe else contextlib.nullcontext()  # of a timestep the host would wait for
        if ways[name] is None:
            with half:
                yield
            return
        with half, parallelize(model, **ways[name], exchange=exchange, output=output, wire=wire) as handle:
            handle.mesh.traffic.clear()
            yield
            sent[name] = handle.mesh.traffic.as_dict()

    for name in ways:
        with shared(name):
            outs[name] = runtime.to_numpy(step())
    times = clock.together(dict.fromkeys(ways, step), ROUNDS, AHEAD_PASSES, shared)
    for name in ways:
        with shared(name):
            step()
    one = outs["one"].astype(np.float64)
    result: dict[str, Any] = {"model": model_name, "precision": precision, "framework": framework, "ranks": wire.size,
                              "exchange": exchange, "output": output, "ways": {}}
    for name, milliseconds in times.items():
        error = ((outs[name] - one) ** 2).sum()
        sqnr_db = float(10 * np.log10((one**2).sum() / error)) if error else None
        ideal = times["one"] / wire.size / milliseconds
        result["ways"][name] = {"ms": milliseconds, "of_ideal": ideal, "sqnr_db": sqnr_db, "bytes": sent.get(name)}
        say(f"{model_name} step, {framework}, {precision}, {name}: {milliseconds:.1f} ms, {100 * ideal:.1f} % of ideal, "
            f"{'equal' if sqnr_db is None else f'{sqnr_db:.1f} dB'} to one GPU"
            + (f", {sent[name]['sent_total'] / 2**20:.0f} MiB sent" if name in sent else ""))
    return result


def _step(model: Any, framework: str, latents: Any, text: Any, runtime: Any, like: Any) -> Callable[[], Any]:
    """One forward of the model."""
    timestep = runtime.from_numpy(np.array([500, 500], np.int64), like, "int64")
    frames, height, width = (runtime.shape(latents)[number] for number in (1, 3, 4))
    if framework == "paddle":
        import paddle

        rotary = model.rotary_tables(frames, height, width)

        def step() -> Any:
            with paddle.no_grad():
                return model(latents, text, timestep, image_rotary_emb=rotary)

        return step
    import torch

    rotary = None
    if model.config.use_rotary_positional_embeddings:
        patch_t = model.config.patch_size_t or 1
        tokens = frames // patch_t * (height // 2) * (width // 2)
        angle = torch.rand(tokens, 32, device="cuda").repeat_interleave(2, 1)
        rotary = (angle.cos(), angle.sin())

    def step() -> Any:
        with torch.no_grad():
            return model(hidden_states=latents, encoder_hidden_states=text, timestep=timestep, image_rotary_emb=rotary,
                         return_dict=False)[0]

    return step
