"""The stage `latents`: clips through the autoencoder, before the transformer trains and while it does."""
from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from clips import ClipPool
from curriculum import Phase, curriculum
from run import Run
from tokens import Tokens

from lowbit_video.eval.world import More
from lowbit_video.files import write_whole

CLIP_SEED = 1001
WORDINGS = 4  # captions a clip
ENCODED = 80_000_000  # pixels, of all frames, that the autoencoder takes at once: its norms want many rows
CHUNK = 512  # clips of the long world, whose plans take milliseconds each, that one worker plans at a time


class Encoded(NamedTuple):
    """Clips on the CPU: latents `[N, F, C, h, w]` fp16, masks bool `[N, F, 1, h, w]` where shapes are, token ids
    `[N, WORDINGS, L]`."""

    latents: torch.Tensor
    masks: torch.Tensor
    ids: torch.Tensor


def plan_ahead(tokenizer: Path, clips: int, seed: int, of: str = "shapes", more: More | None = None
               ) -> tuple[ClipPool, np.ndarray]:
    """The clips to encode and their token ids `[clips, WORDINGS, L]` int16: a worker's task while others train."""
    pool = ClipPool(clips, seed, "cpu", of=of, more=more)
    ids = Tokens(tokenizer)(pool.captions(WORDINGS))
    return pool, ids.reshape(len(pool), WORDINGS, -1).astype(np.int16)


def shrinks_of(run: Run) -> list[int]:
    """By how much height and width of clips are divided in the run's curriculum, most first."""
    return sorted({phase.shrink for phase in curriculum(run.args.curriculum, run.sizes.latent_frames)}, reverse=True)


def planned(run: Run, shrink: int) -> list[tuple]:
    """Arguments of `plan_ahead` for the clips of one size that a process encodes: always the same, or of this moment."""
    seed = CLIP_SEED + 10**8 * run.rank + (int(time.time()) % 100_000 if run.args.fresh_clips else 0)
    clips = share_of_clips(run, shrink)
    if run.sizes.world == "shapes":
        return [(run.tokenizer, clips, seed)]
    seed += 10**6 * shrink
    return [(run.tokenizer, min(CHUNK, clips - start), seed + start, run.sizes.world, more_of(run.args))
            for start in range(0, clips, CHUNK)]


def more_of(args) -> More | None:
    """Of what the run's clips have more than the long world; None where that is nothing."""
    more = More(args.more_spin, args.more_small)
    return None if more == More() else more


def share_of_clips(run: Run, shrink: int = 1) -> int:
    """How many of the clips of one size a process plans: all of `--clips` of the smallest, half as many of twice the height."""
    return -(-run.args.clips // run.ranks) * shrink // shrinks_of(run)[0]


def files_of(run: Run, shrink: int) -> list[Path]:
    """Where encoded clips of one size are kept between runs."""
    return [run.own(f"{name}{'' if shrink == 1 else f'-{shrink}'}.npy") for name in Encoded._fields]


def latent_mask(mask: torch.Tensor) -> torch.Tensor:
    """Where shapes are, bool `[B, 1, F, H, W]` in pixels, for the latents: bool `[B, frames, 1, H / 8, W / 8]`."""
    cells = F.max_pool3d(mask.float(), (1, 8, 8))
    later = F.max_pool3d(cells[:, :, 1:], (4, 1, 1)) if cells.shape[2] > 1 else cells[:, :, 1:]
    return (torch.cat([cells[:, :, :1], later], 2) > 0).permute(0, 2, 1, 3, 4)


@torch.no_grad()
def encode(run: Run, pool: ClipPool, part: np.ndarray, frames: int, shrink: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips `part` of a pool, `frames` frames of them: (latents `[B, F, C, h, w]` fp16, latent_mask)."""
    height = run.sizes.height // shrink
    at_once = max(1, ENCODED // (frames * height * run.sizes.width // shrink))
    found = []
    for few in np.array_split(part, -(-len(part) // at_once)):
        video, mask = pool.paint(few, 0, frames, height)
        with run.vae_autocast():
            latents = run.vae.encode(video).latent_dist.mode()
        found.append(((latents.float() * run.vae.config.scaling_factor).permute(0, 2, 1, 3, 4).half(), latent_mask(mask)))
    return tuple(torch.cat(parts) for parts in zip(*found))


def make_latents(run: Run) -> None:
    """Encode as many clips of each size of the curriculum as the time allows: `run.encoded`."""
    run.encoded = {shrink: _read(run, shrink) or _make(run, shrink) for shrink in shrinks_of(run)}


def _read(run: Run, shrink: int) -> Encoded | None:
    paths, start = files_of(run, shrink), time.time()
    if run.args.fresh_clips or not all(path.exists() for path in paths):
        return None
    found = Encoded(*(torch.from_numpy(np.load(path)) for path in paths))
    run.log.say(f"{len(found.latents)} encoded clips read in {time.time() - start:.1f} s")
    return found


def _make(run: Run, shrink: int) -> Encoded:
    args, log = run.args, run.log
    coming = run.ahead.get(shrink) or [None] * len(planned(run, shrink))
    start, waited, done, found = time.time(), 0.0, 0, []
    for answer, task in zip(coming, planned(run, shrink)):
        if found and time.time() - start >= args.latent_seconds:
            break
        asked = time.time()
        pool, ids = answer.get() if answer else plan_ahead(*task)
        pool.device = run.device
        waited += time.time() - asked
        for part in np.array_split(np.arange(len(pool)), -(-len(pool) // (8 if args.tiny else 32))):
            if time.time() - start - waited >= args.latent_seconds and done >= 64:
                break
            latents, masks = encode(run, pool, part, run.sizes.frames, shrink)
            found.append((latents.cpu(), masks.cpu(), torch.from_numpy(ids[part].astype(np.int64))))
            done += len(part)
    made = Encoded(*(torch.cat(parts) for parts in zip(*found)))
    log.say(f"{done} clips encoded in {time.time() - start:.1f} s, of which {waited:.1f} s were waits for plans; latents "
            f"{tuple(made.latents.shape)}, mean {made.latents[:256].float().mean():.3f}, spread "
            f"{made.latents[:256].float().std():.3f}, {100 * made.masks[:256].float().mean():.1f} % of them on shapes")

    def write() -> None:  # gigabytes: beside the training, and whole or not at all
        with contextlib.ExitStack() as complete:
            for path, tensor in zip(files_of(run, shrink), made):
                np.save(complete.enter_context(write_whole(path)), tensor.numpy())

    writer = threading.Thread(target=write)
    writer.start()
    run.writers.append(writer)
    return made


class Cache:
    """Encoded clips to train on in one phase of the curriculum; grows to `--clips` (the share of this process) by new clips,
    then replaces the oldest ones.

    It starts with the clips that the latents stage encoded. New ones are planned by a worker process, painted and encoded
    between training steps."""

    def __init__(self, run: Run, phase: Phase, seed: int, read):
        """`read` makes of token ids `[..., L]` what a training step wants of a caption: features, or the ids as they are."""
        self.run, self.phase, self.read = run, phase, read
        latents, masks, ids = run.encoded[phase.shrink]
        known = len(latents)
        capacity = max(known, share_of_clips(run, phase.shrink))

        def room(start: torch.Tensor) -> torch.Tensor:
            whole = torch.zeros((capacity, *start.shape[1:]), dtype=start.dtype, device=run.device)
            whole[:known] = start
            return whole

        self.latents, self.masks = room(latents[:, :phase.frames]), room(masks[:, :phase.frames])
        self.captions = room(torch.cat([read(part.to(run.device)) for part in ids.split(256)]))
        self.count, self.oldest, self.fresh = known, 0, 0
        self.seed, self.used = seed, 0
        self.plan, self.coming = None, None

    def _next_plan(self) -> None:
        """The next planned clips into `plan`, and a worker set to the ones after."""
        of = self.run.sizes.world
        size = 16 if self.run.device.type == "cpu" else 2048 if of == "shapes" else CHUNK
        workers = self.run.judges.pool

        def asked():
            self.seed += 1
            task = (self.run.tokenizer, size, self.seed, of, more_of(self.run.args))
            return workers.apply_async(plan_ahead, task) if workers else task

        coming = self.coming or asked()
        self.coming = asked()
        pool, ids = coming.get() if workers else plan_ahead(*coming)
        pool.device = self.run.device
        self.plan, self.used = (pool, torch.from_numpy(ids.astype(np.int64)).to(self.run.device)), 0

    def add(self, clips: int) -> None:
        """Encode `clips` new clips."""
        if self.plan is None or self.used + clips > len(self.plan[0]):
            self._next_plan()
        pool, ids = self.plan
        part = np.arange(self.used, min(self.used + clips, len(pool)))
        self.used = int(part[-1]) + 1
        latents, masks = encode(self.run, pool, part, 4 * (self.phase.frames - 1) + 1, self.phase.shrink)
        rows = (self.oldest + torch.arange(len(part))) % len(self.latents)
        if self.count < len(self.latents):
            rows = torch.arange(self.count, min(self.count + len(part), len(self.latents)))
            self.count = int(rows[-1]) + 1
        else:
            self.oldest = (self.oldest + len(part)) % len(self.latents)
        taken = slice(len(rows))
        rows = rows.to(self.run.device)
        self.latents[rows], self.masks[rows] = latents[taken], masks[taken]
        self.captions[rows] = self.read(ids[torch.from_numpy(part[taken]).to(ids.device)])
        self.fresh += len(rows)
