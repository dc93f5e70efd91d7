"""Q, K and V of a trained model's attention, captured on a CPU without sampling: of a clip of its world, noised for a step.

A few layers of one forward of the transformer a step, through diffusers, at the step's noise of the clip's own latents.
"""
from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowbit_video.eval.world.folder import world_of
from lowbit_video.files import write_whole
from lowbit_video.hook.apply import apply
from lowbit_video.hook.processors import ExactAttnProcessor
from lowbit_video.hook.report import attention_modules
from lowbit_video.pipelines.shared.generation import read_generation


class Capture(NamedTuple):
    """q, k, v: [H, N, D] float32, text tokens first. text: how many there are. grid: frames, rows and columns of the video's
    tokens. layer, step: where they are from."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    text: int
    grid: tuple[int, int, int]
    layer: int
    step: int


class Keeper(ExactAttnProcessor):
    """Exact attention that keeps what it was called with, [H, N, D] each."""

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        self.kept = [x[0].float().numpy().swapaxes(0, 1).copy() for x in (q, k, v)]
        return super().attend(q, k, v, is_causal, scale, return_lse)


def captures(model: str | Path, folder: Path, layers: Sequence[int], steps: Sequence[int], clips: int, seed: int = 7,
             say: Callable[[str], None] = print) -> list[Path]:
    """Files with one `Capture` each, of a model folder that diffusers reads and whose generation.json names a world.

    folder: where they are kept; those that are there are not made again. layers, steps: by number. clips: how many, of
        combinations that training never saw.
    Raises ValueError for a model of no known world, or a layer or a step that it has not.
    """
    asked, name = read_generation(model), world_of(model)
    if name is None:
        raise ValueError(f"{model} has no generation.json that names a world; captures are of a clip of the model's world")
    if not 0 <= min(steps) <= max(steps) < asked["steps"]:
        raise ValueError(f"steps {list(steps)}: the model takes {asked['steps']}, numbered from 0")
    which = hashlib.sha256(f"{Path(model).resolve()} {seed}".encode()).hexdigest()[:8]
    files = {(clip, step, layer): folder / f"{which}_clip{clip}_step{step}_layer{layer}.npz"
             for clip in range(clips) for step in steps for layer in layers}
    if not all(file.is_file() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        _make(model, asked, name, files, seed, say)
    return list(files.values())


def load(file: Path) -> Capture:
    """One capture."""
    with np.load(file) as held:
        return Capture(held["q"], held["k"], held["v"], int(held["text"]), tuple(int(n) for n in held["grid"]),
                       int(held["layer"]), int(held["step"]))


def _make(model, asked, name, files, seed, say) -> None:
    """One forward of the transformer for each clip and step of which a file lacks."""
    import torch
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(model).to(torch.float32)
    names = list(attention_modules(pipe.transformer))
    layers = sorted({layer for _, _, layer in files})
    if not 0 <= layers[0] <= layers[-1] < len(names):
        raise ValueError(f"layers {layers}: {model} has {len(names)}, numbered from 0")
    pipe.scheduler.set_timesteps(asked["steps"])
    todo = sorted({(clip, step) for (clip, step, _), file in files.items() if not file.is_file()})
    clips = {}
    with torch.no_grad():
        for clip, step in todo:
            begin = time.perf_counter()
            if clip not in clips:
                clips[clip] = _latents_of(pipe, asked, name, seed + clip)
            latents, text = clips[clip]
            timestep = pipe.scheduler.timesteps[step][None]
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed + 100 * clip + step))
            grid = latents.shape[1], *(side // pipe.transformer.config.patch_size for side in latents.shape[3:])
            keepers = {names[layer]: Keeper() for layer in layers}
            turned = pipe._prepare_rotary_positional_embeddings(asked["height"], asked["width"], latents.shape[1], torch.device(
                "cpu")) if pipe.transformer.config.use_rotary_positional_embeddings else None
            with apply(pipe, None, keepers):
                pipe.transformer(pipe.scheduler.add_noise(latents, noise, timestep), text, timestep, image_rotary_emb=turned)
            for layer in layers:
                q, k, v = keepers[names[layer]].kept
                with write_whole(files[clip, step, layer]) as part, open(part, "wb") as opened:
                    np.savez(opened, q=q, k=k, v=v, text=text.shape[1], grid=grid, layer=layer, step=step)
            say(f"captured clip {clip}, step {step}: {q.shape[1]} tokens, {time.perf_counter() - begin:.0f} s")


def _latents_of(pipe, asked, name, seed) -> tuple[Any, Any]:
    """A held-out clip's latents [1, F, C, h, w], scaled as the transformer takes them, and its caption's [1, L, C]."""
    import torch

    from lowbit_video.eval import world

    there = world.WORLDS[name]
    meanings = world.draw_meanings(1, seed, True, world=there)
    frames = world.render(world.plan(meanings, seed, world=there), asked["height"], asked["width"])[:, :asked["frames"]]
    pixels = torch.from_numpy((frames / 127.5 - 1).astype(np.float32)).permute(0, 4, 1, 2, 3)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    caption = world.caption_of(meanings[0], np.random.default_rng(seed + 1))
    text, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False,
                                 max_sequence_length=pipe.transformer.config.max_text_seq_length)
    return latents.permute(0, 2, 1, 3, 4).contiguous(), text
