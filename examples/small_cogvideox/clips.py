"""Captioned clips of the world, painted by PyTorch where the training runs."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lowbit_video.eval import world


class ClipPool:
    """A seeded set of planned clips that can be painted in batches.

    Args:
        count: clips to plan; none of them in a held-out combination unless `held`.
        seed: the same seed gives the same clips.
        device: where `paint` puts the frames.
        of: the world's name.
        more: of what there is more than the long world has.
    """

    def __init__(self, count: int, seed: int, device, held: bool = False, of: str = "shapes", more: world.More | None = None):
        self.world = world.WORLDS[of]
        self.meanings = world.draw_meanings(count, seed, held, world=self.world, more=more)
        self.plan = world.plan(self.meanings, seed, world=self.world)
        self.device = torch.device(device)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.meanings)

    def captions(self, variants: int) -> list[str]:
        """`variants` wordings of each clip: clip 0's, then clip 1's, ..."""
        rng = np.random.default_rng(self.seed + 1)
        return [world.caption_of(meaning, rng) for meaning in self.meanings for _ in range(variants)]

    def paint(self, index, first: int = 0, frames: int | None = None, height: int | None = None):
        """Clips `index`, `frames` of them from `first` on: (video, mask), `[B, 3, F, H, W]` in -1..1 and `[B, 1, F, H, W]`
        bool, true where a shape covers the background."""
        plan = self.plan.take(index)
        height = height or self.world.height
        unit = height / self.world.height
        window = slice(first, first + (frames or self.world.frames))

        def put(array, scale=1.0):
            return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.device, non_blocking=True) * scale

        there = replace(
            plan, rgb=put(plan.rgb), x=put(plan.x[:, window], unit), y=put(plan.y[:, window], unit),
            radius=put(plan.radius[:, window], unit), angle=put(plan.angle[:, window]), tone=put(plan.tone),
            texture=torch.from_numpy(plan.texture).to(self.device))
        if plan.ground is not None:
            ground = plan.ground
            there = replace(there, ground=replace(
                ground, tone=there.tone, angle=put(ground.angle), period=put(ground.period), phase=put(ground.phase),
                x=put(ground.x[:, window]), y=put(ground.y[:, window]), zoom=put(ground.zoom[:, window])))
        width = height * self.world.width // self.world.height
        ground = world.paint_ground(there, height, width, torch)
        video = world.render(there, height, width, torch, ground.clone())
        mask = (video - ground).abs().amax(-1) > 8
        return video.permute(0, 4, 1, 2, 3) / 127.5 - 1, mask[:, None]


def as_uint8(video: torch.Tensor) -> np.ndarray:
    """`[B, 3, F, H, W]` in -1..1 to uint8 `[B, F, H, W, 3]`. Raises ValueError for values that are NaN or infinite."""
    broken = int((~torch.isfinite(video)).sum())
    if broken:
        raise ValueError(f"the video has {broken} NaN or infinite values of {video.numel()}")
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()
