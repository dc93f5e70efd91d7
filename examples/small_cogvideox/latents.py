"""The stage `latents`: clips through the autoencoder, before the transformer trains and while it does."""
from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clips import ClipPool
from run import Run
from tokens import Tokens

from lowbit_video.files import write_whole

CLIP_SEED = 1001
WORDINGS = 4  # captions a clip


def plan_ahead(tokenizer: Path, clips: int, seed: int) -> tuple[ClipPool, np.ndarray]:
    """The clips to encode and their token ids `[clips, WORDINGS, L]` int16: a worker's task while others train."""
    pool = ClipPool(clips, seed, "cpu")
    ids = Tokens(tokenizer)(pool.captions(WORDINGS))
    return pool, ids.reshape(len(pool), WORDINGS, -1).astype(np.int16)


def clip_seed(run: Run) -> int:
    """Of the clips that a process encodes: always the same, or of this moment."""
    return CLIP_SEED + 10**8 * run.rank + (int(time.time()) % 100_000 if run.args.fresh_clips else 0)


def share_of_clips(run: Run) -> int:
    """How many of the clips one process plans."""
    return -(-run.args.clips // run.ranks)


def latent_mask(mask: torch.Tensor) -> torch.Tensor:
    """Where shapes are, bool `[B, 1, F, H, W]` in pixels, for the latents: bool `[B, frames, 1, H / 8, W / 8]`."""
    cells = F.max_pool3d(mask.float(), (1, 8, 8))
    later = F.max_pool3d(cells[:, :, 1:], (4, 1, 1)) if cells.shape[2] > 1 else cells[:, :, 1:]
    return (torch.cat([cells[:, :, :1], later], 2) > 0).permute(0, 2, 1, 3, 4)


@torch.no_grad()
def encode(run: Run, pool: ClipPool, part: np.ndarray, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips `part` of a pool, `frames` frames of them: (latents `[B, F, C, h, w]` fp16, latent_mask)."""
    video, mask = pool.paint(part, 0, frames, run.sizes.height)
    with run.vae_autocast():
        found = run.vae.encode(video).latent_dist.mode()
    return (found.float() * run.vae.config.scaling_factor).permute(0, 2, 1, 3, 4).half(), latent_mask(mask)


def make_latents(run: Run) -> None:
    """Encode as many clips as the time allows: `run.latents` `[N, F, C, h, w]` fp16, `run.masks` bool `[N, F, 1, h, w]` where
    shapes are, token ids `run.ids` `[N, K, L]`."""
    args, log = run.args, run.log
    paths = [run.own(f"{name}.npy") for name in ("latents", "masks", "ids")]
    start = time.time()
    if all(path.exists() for path in paths) and not args.fresh_clips:
        run.latents, run.masks, run.ids = (torch.from_numpy(np.load(path)).to(run.device) for path in paths)
        log.say(f"{len(run.latents)} encoded clips read in {time.time() - start:.1f} s")
        return
    pool, ids = run.ahead.get() if run.ahead else plan_ahead(run.tokenizer, share_of_clips(run), clip_seed(run))
    pool.device = run.device
    log.say(f"{len(pool)} clips planned and put into words, waited {time.time() - start:.1f} s")
    start, done, found, batch = time.time(), 0, [], 8 if args.tiny else 32
    while done < len(pool) and (time.time() - start < args.latent_seconds or done < 64):
        part = np.arange(done, min(done + batch, len(pool)))
        try:
            found.append(encode(run, pool, part, run.sizes.frames))
        except torch.cuda.OutOfMemoryError:
            batch = max(1, batch // 2)
            torch.cuda.empty_cache()
            continue
        done = int(part[-1]) + 1
    run.latents, run.masks = (torch.cat(parts) for parts in zip(*found))
    run.ids = torch.from_numpy(ids[:done].astype(np.int64)).to(run.device)
    log.say(f"{done} clips encoded in {time.time() - start:.1f} s; latents {tuple(run.latents.shape)}, mean "
            f"{run.latents.float().mean():.3f}, spread {run.latents.float().std():.3f}, {100 * run.masks.float().mean():.1f} % "
            "of them on shapes")
    start, copied = time.time(), [part.cpu().numpy() for part in (run.latents, run.masks, run.ids)]

    def write() -> None:  # gigabytes: beside the training, and whole or not at all
        with contextlib.ExitStack() as complete:
            for path, array in zip(paths, copied):
                np.save(complete.enter_context(write_whole(path)), array)

    threading.Thread(target=write, daemon=True).start()
    log.say(f"copied in {time.time() - start:.1f} s, being written for the next run")


class Cache:
    """Encoded clips to train on, of the first `frames` latent frames; grows to `--clips` (the share of this process) by new
    clips, then replaces the oldest ones.

    It starts with the clips that the latents stage encoded. New ones are planned by a worker process, painted and encoded
    between training steps."""

    def __init__(self, run: Run, frames: int, seed: int, read):
        """`read` makes of token ids `[..., L]` what a training step wants of a caption: features, or the ids as they are."""
        self.run, self.frames, self.read = run, frames, read
        known = len(run.latents)
        capacity = max(known, share_of_clips(run))

        def room(start: torch.Tensor) -> torch.Tensor:
            whole = torch.zeros((capacity, *start.shape[1:]), dtype=start.dtype, device=run.device)
            whole[:known] = start[:known]
            return whole

        self.latents, self.masks = room(run.latents[:, :frames]), room(run.masks[:, :frames])
        self.captions = room(torch.cat([read(part) for part in run.ids.split(256)]))
        self.count, self.oldest, self.fresh = known, 0, 0
        self.seed, self.used = seed, 0
        self.plan, self.coming = None, None

    def _next_plan(self) -> None:
        """The next planned clips into `plan`, and a worker set to the ones after."""
        size = 2048 if self.run.device.type == "cuda" else 16
        workers = self.run.judges.pool

        def asked():
            self.seed += 1
            task = (self.run.tokenizer, size, self.seed)
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
        latents, masks = encode(self.run, pool, part, 4 * (self.frames - 1) + 1)
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
