"""Videos from captions, in batches, and what the scorer says of them."""
from __future__ import annotations

import multiprocessing
import os
import textwrap

import numpy as np
import torch
from clips import as_uint8

from lowbit_video.eval import world
from lowbit_video.eval.world import judge
from lowbit_video.pipelines.shared import video_files


def noise_of(count: int, shape, seed: int) -> torch.Tensor:
    """Seeded start noise `[count, *shape]`, the same on every device."""
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def held_out_captions(count: int, seed: int, of: str = "shapes") -> list[str]:
    """Captions of combinations that training never sees, of the world of that name."""
    rng = np.random.default_rng(seed + 1)
    return [world.caption_of(meaning, rng) for meaning in world.draw_meanings(count, seed, True, world=world.WORLDS[of])]


@torch.no_grad()
def sample_quickly(text_encoder, transformer, vae, scheduler, ids, noise, guidance: float, steps: int, autocast,
                   vae_autocast, rotations=None) -> np.ndarray:
    """DDIM with guidance on prepared token ids `[B, L]` (an empty caption is </s>, pad, ...): uint8 `[B, F, H, W, 3]`.

    `autocast` and `vae_autocast` make the contexts that the models run in; `rotations` are for a transformer that rotates."""
    more = {} if rotations is None else {"image_rotary_emb": rotations}
    empty = torch.zeros_like(ids)
    empty[:, 0] = 1
    scheduler.set_timesteps(steps, device=ids.device)
    latents = noise.to(ids.device)
    with autocast():
        text = text_encoder(torch.cat([empty, ids]))[0]
    for step in scheduler.timesteps:
        with autocast():
            velocity = transformer(torch.cat([latents, latents]), text, step.expand(2 * len(ids)), return_dict=False, **more)[0]
        free, led = velocity.float().chunk(2)
        latents = scheduler.step(free + guidance * (led - free), step, latents, return_dict=False)[0].to(noise.dtype)
    frames = []
    at_once = max(1, 55_296 // latents[0, :, 0].numel())
    for part in (latents / vae.config.scaling_factor).permute(0, 2, 1, 3, 4).split(at_once):
        with vae_autocast():
            frames.append(as_uint8(vae.decode(part).sample))
    return np.concatenate(frames)


def sample_with_pipeline(pipe, captions: list[str], noise: torch.Tensor, generation: dict, batch: int = 50) -> np.ndarray:
    """The same through diffusers' own pipeline: uint8 `[B, F, H, W, 3]`."""
    videos = []
    for start in range(0, len(captions), batch):
        part = slice(start, start + batch)
        frames = pipe(
            prompt=captions[part], latents=noise[part].to(pipe.device, pipe.transformer.dtype),
            guidance_scale=generation["guidance_scale"], num_inference_steps=generation["num_inference_steps"],
            num_frames=generation["num_frames"], height=generation["height"], width=generation["width"],
            max_sequence_length=generation["max_sequence_length"], output_type="np").frames
        videos += [video_files.as_uint8(video) for video in np.asarray(frames, np.float32)]
    return np.stack(videos)


class Judges:
    """Worker processes that score videos; start them before the first use of the GPU, since they are forked."""

    def __init__(self, workers: int | None = None):
        workers = workers or min(16, os.cpu_count() or 1)
        self.pool = multiprocessing.get_context("fork").Pool(workers) if workers > 1 else None

    def __call__(self, videos, captions: list[str], of: str = "shapes") -> list[judge.Adherence]:
        """Verdicts, one a video, in the world of that name."""
        work = [(video, caption, world.WORLDS[of]) for video, caption in zip(videos, captions)]
        return self.pool.starmap(judge.score, work, chunksize=2) if self.pool else [judge.score(*job) for job in work]

    def close(self) -> None:
        if self.pool:
            self.pool.terminate()


def shares(verdicts) -> dict[str, float]:
    """Share of the videos that meet each part, and all of them; nothing of no verdicts."""
    if not verdicts:
        return {}
    return {part: float(np.mean([getattr(v, part) for v in verdicts])) for part in (*verdicts[0].parts, "all")}


def colour_pairs(verdicts) -> dict[str, int]:
    """Of the videos that should hold one shape: how many show its colour and the background's, these two exchanged, or
    neither."""
    found = {"right": 0, "exchanged": 0, "other": 0}
    for verdict in verdicts:
        asked, seen = verdict.meaning, verdict.scene
        if len(asked.things) == 1:
            wanted = (asked.things[0].colour, asked.background)
            shown = (seen.things[0].colour, seen.background) if len(seen.things) == 1 else None
            found["right" if shown == wanted else "exchanged" if shown == wanted[::-1] else "other"] += 1
    return found


def percent(figures: dict[str, float]) -> str:
    return "  ".join(f"{part} {100 * share:.1f} %" for part, share in figures.items())


def contact_sheet(videos, captions, verdicts, path, columns: int = 6, rows: int = 24) -> None:
    """Frames of the first `rows` videos, one video a row, its caption and what the scorer saw beside it, as a PNG."""
    from PIL import Image, ImageDraw

    height, width = videos.shape[2] // 2, videos.shape[3] // 2
    rows = min(rows, len(videos))
    sheet = Image.new("RGB", (columns * (width + 2) + 560, rows * (height + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        for column, frame in enumerate(np.linspace(0, videos.shape[1] - 1, columns).astype(int)):
            tile = Image.fromarray(videos[row, frame]).resize((width, height), Image.BILINEAR)
            sheet.paste(tile, (column * (width + 2), row * (height + 2)))
        left = columns * (width + 2) + 4
        missed = [part for part in verdicts[row].parts if not getattr(verdicts[row], part)] if verdicts else []
        lines = textwrap.wrap(captions[row], 88)
        if verdicts:
            lines += textwrap.wrap(f"seen: {verdicts[row].scene}", 88)
            lines.append(f"missed: {', '.join(missed)}" if missed else "as asked")
        draw.multiline_text((left, row * (height + 2) + 2), "\n".join(lines), fill="red" if missed else "black", spacing=1)
    sheet.save(path)


def save_gif(frames: np.ndarray, path, fps: int = world.FPS) -> None:
    from PIL import Image

    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
