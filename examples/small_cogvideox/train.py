"""Train the small CogVideoX on captioned clips of the procedural world: VAE, latents, words, diffusion, evaluation.

    python examples/small_cogvideox/train.py --minutes 9 --state /tmp/small --out outputs/small

Each run keeps to its `--minutes` of wall clock and goes on from what `--state` holds, so that several short runs make one
training. `torchrun --standalone --nproc_per_node 2 examples/small_cogvideox/train.py ...` uses two GPUs: each encodes clips of
its own and takes `--batch` of them a step. `--tiny` runs every stage at toy sizes on a CPU, to see that it works.
"""
from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import sys
import tarfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import words
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from clips import ClipPool, as_uint8
from models import (
    MAX_TOKENS,
    SIZES,
    TINY,
    TextToVelocity,
    Tokens,
    build_scheduler,
    build_text_encoder,
    build_transformer,
    build_vae,
    build_vocabulary,
    describe,
    generation_defaults,
    initialise,
    load_pipeline,
    rescale_latents,
    save,
    write_generation,
)
from optimisers import StackedMuon
from sampling import (
    Judges,
    colour_pairs,
    contact_sheet,
    held_out_captions,
    noise_of,
    percent,
    sample_quickly,
    sample_with_pipeline,
    save_gif,
    shares,
)

from lowbit_video.eval import prompt_adherence

PARTS = prompt_adherence.PARTS
STAGES = ("vae", "latents", "words", "diffusion", "evaluate")
TRAIN_SEED, CHECK_SEED, SWEEP_SEED, TEST_SEED = 1000, 2000, 3000, 4000
AVERAGE_EVERY = 4  # steps
CLOCK_EVERY = 10  # steps, where several processes have to agree on the time
SAME = 0.02  # relative distance up to which two bf16 predictions are one
WORSE = 1.4  # times the best loss of this clip length: the weights go back to the last good ones
CAPTION_DROPOUT = 0.1
WORDINGS = 4  # captions a clip
PART_BYTES = 15_500_000


class Log:
    """Prints, and appends rows to `log.csv`, so that a run that breaks leaves its trace. Only one process `speaks`."""

    def __init__(self, state: Path, speaks: bool):
        self.start = time.time()
        self.path = state / "log.csv"
        self.speaks = speaks
        if not speaks:
            return
        fresh = not self.path.exists()
        self.file = open(self.path, "a", newline="")
        self.rows = csv.writer(self.file)
        if fresh:
            self.rows.writerow(["stage", "step", "minutes", "name", "value"])

    def say(self, text: str) -> None:
        if self.speaks:
            print(f"[{time.time() - self.start:6.1f} s] {text}", flush=True)

    def row(self, stage: str, step: int, minutes: float, **values: float) -> None:
        if self.speaks:
            for name, value in values.items():
                self.rows.writerow([stage, step, f"{minutes:.3f}", name, f"{value:.6g}"])
            self.file.flush()


class Run:
    """What every stage needs: arguments, sizes, device, deadline, log."""

    def __init__(self, args, accelerator: Accelerator, judges: Judges):
        self.args = args
        self.accelerator, self.judges = accelerator, judges
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.first = accelerator.is_main_process
        self.state = Path(args.state)
        self.out = Path(args.out)
        for folder in (self.state, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.state, self.first)
        self.sizes = TINY if args.tiny else SIZES
        self.device = accelerator.device if torch.cuda.is_available() else torch.device("cpu")
        self.deadline = time.time() + 60 * args.minutes
        self.vae = None
        self.vae_bf16 = True
        self.latents = self.masks = self.ids = None  # of the encoded clips
        self.ahead = self.word_sets = None  # what workers prepare meanwhile

    def left(self) -> float:
        return self.deadline - time.time()

    def own(self, name: str) -> Path:
        """This process's file of that name in the state folder."""
        return self.state / (name if self.first else f"{self.rank}-{name}")

    def autocast(self):
        """bf16 on the GPU, float32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def vae_autocast(self):
        """For the autoencoder: bf16 on the GPU unless its convolutions were found faster without."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" and self.vae_bf16)


def save_state(path: Path, content: dict) -> None:
    """All or nothing: a run killed while writing keeps the state before."""
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


# --- the autoencoder --------------------------------------------------------------------------------------------------


def vae_batch(run: Run, pool: ClipPool, rng, batch: int, frames: int, whole: bool):
    """Clips for one step: windows of `frames`; whole frames, or a quarter of each near its first shape."""
    height, width = run.sizes.height, run.sizes.width
    first = int(rng.integers(0, run.sizes.frames - frames + 1))
    index = rng.integers(0, len(pool), batch)
    video, mask = pool.paint(index, first, frames, height)
    if whole:
        return video, mask
    rows = np.searchsorted(pool.plan.clip, index)
    unit = height / 128
    middle = first + frames // 2
    tops = pool.plan.y[rows, middle] * unit - height / 4 + rng.uniform(-height / 4, height / 4, batch)
    lefts = pool.plan.x[rows, middle] * unit - width / 4 + rng.uniform(-width / 4, width / 4, batch)
    tops = np.clip(tops / 8, 0, height / 16).astype(int) * 8
    lefts = np.clip(lefts / 8, 0, width / 16).astype(int) * 8

    def cut(tensor):
        return torch.stack([tensor[i, :, :, t:t + height // 2, l:l + width // 2]
                            for i, (t, l) in enumerate(zip(tops, lefts))])

    return cut(video), cut(mask)


def vae_loss(vae, video, mask, kl_weight: float):
    """Absolute and squared error, three times as heavy where a shape is, and a little KL: (loss, mean squared error)."""
    posterior = vae.encode(video).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = vae.decode(latents.to(video.dtype)).sample.float() - video
    weight = 1 + 2 * mask
    square = error.square()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (weight * (0.3 * error.abs() + 6 * square)).mean() + kl_weight * kl, square.detach().mean()


def psnr_db(mean_square: float) -> float:
    return 10 * math.log10(4.0 / max(mean_square, 1e-12))  # frames lie in -1..1


@torch.no_grad()
def reconstruct(run: Run, vae, count: int = 48) -> tuple[float, dict[str, float]]:
    """Held-out clips, full length, through the autoencoder: (mean PSNR in dB as 8-bit frames, what the scorer says of them).

    What it misses here, no transformer can make good."""
    pool = ClipPool(count, CHECK_SEED, run.device, held=True)
    found, videos = [], []
    for part in np.array_split(np.arange(count), max(1, count // 8)):
        video, _ = pool.paint(part, 0, run.sizes.frames, run.sizes.height)
        with run.vae_autocast():
            videos.append(as_uint8(vae.decode(vae.encode(video).latent_dist.mode()).sample))
        error = videos[-1].astype(np.float32) - as_uint8(video).astype(np.float32)
        found += [10 * math.log10(255.0**2 / max(e, 1e-9)) for e in np.square(error).mean((1, 2, 3, 4))]
    return float(np.mean(found)), shares(run.judges(np.concatenate(videos), pool.captions(1)))


def place(vae, layout) -> None:
    """Lay the convolutions' weights out in memory as `layout` says (2-D ones likewise)."""
    flat = torch.channels_last if layout == torch.channels_last_3d else torch.contiguous_format
    for parameter in vae.parameters():
        if parameter.ndim in (4, 5):
            parameter.data = parameter.data.contiguous(memory_format=layout if parameter.ndim == 5 else flat)


def fastest_layout(run: Run, vae, pool, rng, batch: int, frames: int):
    """Try convolution layouts and precisions on a real step and keep the fastest: the memory format; sets `vae_bf16`."""
    if run.device.type != "cuda":
        return torch.contiguous_format
    video, mask = vae_batch(run, pool, rng, batch, frames, whole=False)
    choices = {}
    began = time.time()
    for name, half, layout in (("bf16 channels last", True, torch.channels_last_3d),
                               ("tf32 planes", False, torch.contiguous_format),
                               ("bf16 planes", True, torch.contiguous_format)):
        if choices and time.time() - began > 9:  # searching for algorithms can take seconds a choice
            break
        run.vae_bf16 = half
        try:
            place(vae, layout)
            placed = video.contiguous(memory_format=layout)
            for i in range(7):
                if i == 3:
                    torch.cuda.synchronize()
                    start = time.time()
                with run.vae_autocast():
                    loss, _ = vae_loss(vae, placed, mask, 1e-4)
                loss.backward()
            torch.cuda.synchronize()
            seconds = (time.time() - start) / 4
            if math.isfinite(loss.item()):
                choices[name] = (seconds, half, layout)
            run.log.say(f"vae step of {batch} as {name}: {1000 * seconds:.0f} ms")
        except Exception as error:  # a layout that this GPU's libraries refuse is only a slower choice lost
            run.log.say(f"vae step as {name} failed: {str(error)[:200]}")
            torch.cuda.empty_cache()
        vae.zero_grad(set_to_none=True)
    if not choices:
        raise RuntimeError("no convolution layout works on this GPU")
    name = min(choices, key=lambda n: choices[n][0])
    run.log.say(f"vae trains as {name}")
    _, run.vae_bf16, layout = choices[name]
    place(vae, layout)
    return layout


def train_vae(run: Run) -> None:
    """Fill `run.vae`; `vae.pt` in the state folder says whether it is finished."""
    args, log = run.args, run.log
    path = run.state / "vae.pt"
    vae = build_vae(run.sizes).to(run.device)
    total = 60 * args.vae_minutes
    spent, step = 0.0, 0
    if args.init and "vae" in args.init_parts and not path.exists():
        vae = type(vae).from_pretrained(args.init, subfolder="vae").float().to(run.device)
        if vae.config.latent_channels != run.sizes.latent_channels:
            raise ValueError(f"the autoencoder in {args.init} has {vae.config.latent_channels} latent channels, this training "
                             f"{run.sizes.latent_channels}; --tiny goes on from folders made with --tiny only")
        log.say(f"vae from {args.init}")
        if not args.vae_goes_on:
            run.vae = vae.eval().requires_grad_(False)
            return
    optimiser = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, betas=(0.9, 0.95), weight_decay=1e-4,
                                  fused=run.device.type == "cuda")
    if path.exists():
        held = torch.load(path, map_location=run.device, weights_only=True)
        vae.load_state_dict(held["model"])
        if held["finished"]:
            log.say("vae is trained already")
            run.vae_bf16 = held["bf16"]
            run.vae = vae.eval().requires_grad_(False)
            return
        optimiser.load_state_dict(held["optimiser"])
        spent, step = held["seconds"], held["step"]
    rng = np.random.default_rng(step)
    pool = ClipPool(64 if args.tiny else 8000, TRAIN_SEED, run.device)
    small, large = (4, 2) if args.tiny else (args.vae_batch, args.vae_batch // 4)
    short, long = 9, 17
    torch.backends.cudnn.benchmark = True
    layout = fastest_layout(run, vae, pool, rng, small, short)
    start = saved = shown = time.time()
    log.say(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {total - spent:.0f} s to go")
    backup = copy.deepcopy(vae.state_dict())
    rate, squares = args.vae_lr, []

    def keep(finished: bool) -> None:
        save_state(path, {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "finished": finished,
                          "seconds": spent + time.time() - start, "step": step})

    while True:
        progress = (spent + time.time() - start) / total
        if progress >= 1 or run.left() < 45 or (args.max_steps and step >= args.max_steps):
            break
        whole = progress > 0.55
        lr = rate * min(1, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * min(progress, 1))))
        for group in optimiser.param_groups:
            group["lr"] = lr
        try:
            video, mask = vae_batch(run, pool, rng, large if whole else small, long if whole else short, whole)
            with run.vae_autocast():
                loss, square = vae_loss(vae, video.contiguous(memory_format=layout), mask, args.kl_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimiser.step()
        except torch.cuda.OutOfMemoryError:
            small, large = max(1, small // 2), max(1, large // 2)
            log.say(f"vae: out of memory, batches now {small} and {large}")
            optimiser.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            continue
        optimiser.zero_grad(set_to_none=True)
        step += 1
        squares.append(square)
        if step % 50 == 0 or args.tiny:
            mean = torch.stack(squares).mean().item()
            squares.clear()
            minutes = (spent + time.time() - start) / 60
            if math.isfinite(mean):
                if step % 200 == 0:
                    backup = copy.deepcopy(vae.state_dict())
                log.row("vae", step, minutes, psnr_db=psnr_db(mean), lr=lr)
            else:
                rate /= 2
                vae.load_state_dict(backup)
                optimiser.state.clear()
                log.say(f"vae: not finite at step {step}; back to the last good weights, learning rate {rate:g}")
            if time.time() - shown > 10:
                shown = time.time()
                log.say(f"vae step {step}: {psnr_db(mean) if math.isfinite(mean) else math.nan:.2f} dB, "
                        f"{'whole frames' if whole else 'quarters'}, lr {lr:.1e}, {100 * progress:.0f} %")
        if time.time() - saved > 120:
            saved = time.time()
            keep(False)
    torch.backends.cudnn.benchmark = False
    vae.eval().requires_grad_(False)
    place(vae, torch.contiguous_format)
    with torch.no_grad():
        video, _ = pool.paint(np.arange(min(len(pool), 64)), 0, run.sizes.frames, run.sizes.height)
        with run.vae_autocast():
            latents = torch.cat([vae.encode(part).latent_dist.mode().float() for part in video.split(16)])
    spread = latents.std((0, 2, 3, 4)).clamp_min(0.05)
    rescale_latents(vae, spread)
    psnr, seen = reconstruct(run, vae)
    log.say(f"vae done after {step} steps: held-out clips {psnr:.2f} dB, {percent(seen)}; latent spread was "
            f"{spread.min():.3f}..{spread.max():.3f}")
    log.row("vae", step, total / 60, held_out_psnr_db=psnr, **{f"held_out_{part}": share for part, share in seen.items()})
    save_state(path, {"model": vae.state_dict(), "optimiser": {}, "finished": True, "seconds": total, "step": step,
                      "bf16": run.vae_bf16})
    run.vae = vae


# --- latents ----------------------------------------------------------------------------------------------------------


def plan_ahead(tokenizer: Path, clips: int, seed: int) -> tuple[ClipPool, np.ndarray]:
    """The clips to encode and their token ids `[clips, WORDINGS, L]` int16: a worker's task while others train."""
    pool = ClipPool(clips, seed, "cpu")
    ids = Tokens(tokenizer)(pool.captions(WORDINGS))
    return pool, ids.reshape(len(pool), WORDINGS, -1).astype(np.int16)


def clip_seed(run: Run) -> int:
    """Of the clips that a process encodes: always the same, or of this moment."""
    return TRAIN_SEED + 1 + 10**8 * run.rank + (int(time.time()) % 100_000 if run.args.fresh_clips else 0)


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
        for path, array in zip(paths, copied):
            with open(path.with_suffix(".part"), "wb") as file:
                np.save(file, array)
        for path in paths:
            os.replace(path.with_suffix(".part"), path)

    threading.Thread(target=write, daemon=True).start()
    log.say(f"copied in {time.time() - start:.1f} s, being written for the next run")


# --- words ------------------------------------------------------------------------------------------------------------


def train_words(run: Run) -> None:
    """Put the captions' meaning into a text encoder's features, by itself; `words.pt` keeps it for the diffusion stage."""
    args, log = run.args, run.log
    path = run.state / "words.pt"
    started = args.init and "text_encoder" in args.init_parts
    if path.exists() or (run.state / "diffusion.pt").exists() or args.words_seconds <= 0 or started:
        log.say("words are learned already, or not asked for")
        return
    sets = run.word_sets.get() if run.word_sets else word_sets(run.tokenizer, args.word_captions)
    (ids, labels), (held_ids, held_labels) = [[torch.from_numpy(part).to(run.device) for part in one] for one in sets]
    encoder = build_text_encoder(run.sizes, run.vocabulary).to(run.device)
    start = time.time()

    def note(step: int, loss: float) -> None:
        log.row("words", step, (time.time() - start) / 60, loss=loss)

    batch = 64 if run.device.type == "cpu" else args.word_batch
    heads, step = words.teach(
        encoder, ids, labels, args.words_seconds, batch, run.autocast, args.words_lr, args.max_steps, note)
    found = words.accuracy(encoder, heads, held_ids, held_labels, run.autocast)
    worst = {kind: f"{words.NAMES[row.argmin()]} {100 * row.min():.1f} %" for kind, row in zip(("mean", "picked"), found)}
    log.say(f"words: {step} steps of {batch} in {time.time() - start:.1f} s; held-out captions read right "
            f"{100 * found.mean():.2f} %, worst {worst}")
    log.row("words", step, (time.time() - start) / 60, held_out_mean=found[0].mean(), held_out_picked=found[1].mean())
    say_swapped(run, encoder, step, (time.time() - start) / 60)
    save_state(path, {"model": encoder.state_dict()})


def say_swapped(run: Run, encoder, step: int, minutes: float) -> None:
    """Log how alike captions with their two colours exchanged are to the encoder: at 1 no colour can find its thing."""
    alike = words.swapped_likeness(encoder, Tokens(run.tokenizer))
    run.log.row("words", step, minutes, swapped_likeness=alike)
    run.log.say(f"captions with colours exchanged are alike to {alike:.5f} for the text encoder"
                + (": IT HAS LOST THE ORDER OF WORDS" if alike > words.COLLAPSED else ""))


def word_sets(tokenizer: Path, count: int):
    """Captions with labels to learn from, and held-out ones to check with: a worker's task while the autoencoder trains."""
    tokens = Tokens(tokenizer)
    return words.caption_set(tokens, count, TRAIN_SEED + 2), words.caption_set(tokens, 2000, CHECK_SEED, held=True)


# --- text encoder and transformer -------------------------------------------------------------------------------------


def build_optimisers(model: TextToVelocity, args, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of the transformer's attention and feed-forward layers unless told otherwise.

    Each group has its `scale` of the learning rate: matrices decay, the text encoder learns at `--text-rate`."""
    groups, by_muon = [], []
    for part, scale in ((model.transformer, 1.0), (model.text_encoder, args.text_rate)):
        decayed, others = [], []
        for name, parameter in part.named_parameters():
            if not parameter.requires_grad:
                continue
            if args.muon and "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name:
                by_muon.append(parameter)
            elif parameter.ndim > 1 and "shared" not in name and "relative" not in name:
                decayed.append(parameter)
            else:
                others.append(parameter)
        groups += [{"params": parameters, "weight_decay": decay, "scale": scale}
                   for parameters, decay in ((decayed, 0.01), (others, 0.0)) if parameters]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=fused)]
    if by_muon:
        optimisers.append(StackedMuon([{"params": by_muon, "scale": 1.0}], lr=args.lr, weight_decay=0.01))
    return optimisers


class Predict(torch.nn.Module):
    """The transformer on noisy latents, text features and times, bf16 on a GPU: what a CUDA graph can hold for one clip length.

    No cast is kept between calls, or a graph would replay the weights of the step that it was made in."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, noisy: torch.Tensor, text: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.is_cuda, cache_enabled=False):
            return self.transformer(noisy, text, times, return_dict=False)[0].float()


def graphed(run: Run, plain: Predict, inputs: tuple[torch.Tensor, ...]):
    """`plain` as CUDA graphs of its forward and backward pass: launching its thousand kernels one by one takes longer than
    running them. `plain` itself where that is not asked for, fails or gives other values."""
    if not (run.args.graphs and run.device.type == "cuda" and run.args.text_rate <= 0):
        return plain
    start = time.time()
    try:
        made = torch.cuda.make_graphed_callables(Predict(plain.transformer), inputs, allow_unused_input=True)
        apart = difference(made, plain, inputs)
    except Exception as error:
        run.log.say(f"no CUDA graph, going on without: {type(error).__name__}: {str(error)[:300]}")
        torch.cuda.synchronize()
        return plain
    run.log.say(f"CUDA graphs made in {time.time() - start:.1f} s, {apart:.4f} from the plain transformer")
    return made if apart < SAME else plain


def difference(first, second, inputs: tuple[torch.Tensor, ...]) -> float:
    """How far two predictions lie apart, as a share of the second's size."""
    one = first(*inputs).detach().clone()
    other = second(*inputs).detach()
    return float((one - other).norm() / other.norm().clamp_min(1e-6)) if torch.isfinite(one).all() else math.inf


def average_gradients(run: Run, parameters: list[torch.Tensor]) -> None:
    """The mean of all processes' gradients, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = run.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(mean.split([g.numel() for g in gradients]), gradients)])


def curriculum(text: str, latent_frames: int) -> list[tuple[int, float]]:
    """"1:0.3,3:0.3,9:0.4" as (latent frames, share of the diffusion time up to which they are used), in order.

    Raises:
        ValueError: not of this form, more frames than a clip has, or it does not end with whole clips."""
    try:
        pairs = [(int(frames), float(share)) for frames, share in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"--curriculum {text!r}: write FRAMES:SHARE,FRAMES:SHARE such as 1:0.3,{latent_frames}:0.7") from None
    if any(share <= 0 or not 1 <= frames <= latent_frames for frames, share in pairs) or pairs[-1][0] != latent_frames:
        raise ValueError(f"--curriculum {text!r}: shares are positive, frames are 1 to {latent_frames} and {latent_frames} "
                         "come last, since the model is used on whole clips")
    ends = np.cumsum([share for _, share in pairs]) / sum(share for _, share in pairs)
    return [(frames, float(end)) for (frames, _), end in zip(pairs, ends)]


class Cache:
    """Encoded clips to train on, of the first `frames` latent frames; grows to `--clips` (the share of this process) by new
    clips, then replaces the oldest ones.

    It starts with the clips that the latents stage encoded. New ones are planned by a worker process, painted and encoded
    between training steps."""

    def __init__(self, run: Run, frames: int, seed: int, read):
        """`read` makes text features of token ids."""
        self.run, self.frames, self.read = run, frames, read
        known = len(run.latents)
        capacity = max(known, share_of_clips(run))

        def room(start: torch.Tensor) -> torch.Tensor:
            whole = torch.zeros((capacity, *start.shape[1:]), dtype=start.dtype, device=run.device)
            whole[:known] = start[:known]
            return whole

        self.latents, self.masks, self.ids = room(run.latents[:, :frames]), room(run.masks[:, :frames]), room(run.ids)
        self.text = room(torch.cat([read(part) for part in run.ids.split(256)]))
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
        said = ids[torch.from_numpy(part[taken]).to(ids.device)]
        self.latents[rows], self.masks[rows] = latents[taken], masks[taken]
        self.ids[rows], self.text[rows] = said, self.read(said)
        self.fresh += len(rows)


def train_diffusion(run: Run) -> None:
    """Train text encoder and transformer on v-prediction until the time is up; the averaged weights go to `model/`."""
    args, log, sizes = run.args, run.log, run.sizes
    path = run.state / "diffusion.pt"
    accelerator = run.accelerator
    model = TextToVelocity(build_text_encoder(sizes, run.vocabulary), build_transformer(sizes))
    initialise(model)
    if (run.state / "words.pt").exists():
        model.text_encoder.load_state_dict(torch.load(run.state / "words.pt", map_location="cpu", weights_only=True)["model"])
    model.to(run.device)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    model.text_encoder.requires_grad_(args.text_rate > 0)
    optimisers = build_optimisers(model, args, run.device.type == "cuda")
    scheduler = build_scheduler(sizes)
    alphas = scheduler.alphas_cumprod.to(run.device, torch.float32)
    spent, step, restarted, earlier = 0.0, 0, 0, 0.0
    if path.exists():
        held = torch.load(path, map_location=run.device, weights_only=True)
        model.load_state_dict(held["model"])
        averaged.load_state_dict(held["averaged"])
        for optimiser, state in zip(optimisers, held["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        spent, step, earlier = held["seconds"], held["step"], held.get("earlier", 0.0)
        log.say(f"diffusion goes on from step {step}, {spent:.0f} s")
        del held
    elif args.init:
        for name in set(args.init_parts) & {"text_encoder", "transformer"}:
            part = getattr(model, name)
            part.load_state_dict(type(part).from_pretrained(args.init, subfolder=name).float().state_dict())
        averaged.load_state_dict(model.state_dict())
        progress_file = Path(args.init) / "training.json"
        if "transformer" in args.init_parts and progress_file.exists():
            before = json.loads(progress_file.read_text())
            earlier, step = before["seconds"], before["steps"]
        restarted = step
        log.say(f"diffusion starts with {', '.join(args.init_parts)} of {args.init}: step {step}, {earlier:.0f} s before")
    if args.compile and run.device.type == "cuda":
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=False)  # one compilation for each clip length
    optimisers = list(accelerator.prepare(*optimisers)) if len(optimisers) > 1 else [accelerator.prepare(*optimisers)]
    learning = [p for p in model.parameters() if p.requires_grad]
    if run.ranks > 1:
        for tensor in (*model.parameters(), *averaged.parameters()):
            tensor.data = broadcast(tensor.data)
    torch.manual_seed(int(time.time()) + 10**6 * run.rank)
    pairs = [(a, b) for a, b in zip(averaged.parameters(), model.parameters())]
    averages, sources = [a for a, _ in pairs], [b for _, b in pairs]
    total = 60 * args.diffusion_minutes
    batch = 8 if args.tiny else args.batch
    phases = curriculum(args.curriculum, sizes.latent_frames)
    cache, positions = None, model_positions(model.transformer)
    plain, predict = Predict(model.transformer), None
    empty = torch.zeros(run.ids.shape[-1], dtype=run.ids.dtype, device=run.device)
    empty[0] = 1
    accelerator.wait_for_everyone()
    start = saved = checked = shown = time.time()
    first_step, rate, losses, refresh_every = step, args.lr, [], args.refresh_every
    best, good = math.inf, None  # loss of this clip length, weights to go back to
    trained_text = args.text_rate > 0
    reserve = args.evaluate_seconds + 12
    if not args.unfinished:  # the schedule ends with this run where its time is the shorter one
        total = max(1.0, min(total, spent + run.left() - reserve))
    log.say(f"diffusion: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, batches of {run.ranks} x "
            f"{batch}, {min(total - spent, run.left() - reserve):.0f} s to go in this run, {total - spent:.0f} s in all")

    writer = None

    def keep(beside: bool) -> None:
        """Save state and model folder as they are now; `beside`: written by a thread while the training goes on."""
        nonlocal writer
        if not run.first:
            return
        if writer is not None:
            writer.join()
        seconds = spent + time.time() - start
        state = on_cpu({"model": model.state_dict(), "averaged": averaged.state_dict(), "seconds": seconds,
                        "optimisers": [o.state_dict() for o in optimisers], "step": step, "earlier": earlier})
        parts = [copy.deepcopy(part).cpu() for part in (run.vae, averaged.text_encoder, averaged.transformer)]
        record = {"seconds": earlier + seconds, "steps": step, "batch": batch * run.ranks, "sizes": describe(sizes)}

        def write() -> None:
            save(run.state / "model", *parts, sizes, generation_defaults(sizes))
            (run.state / "model" / "training.json").write_text(json.dumps(record, indent=2) + "\n")
            if beside and args.pack:
                pack_model(run)
            save_state(path, state)

        writer = threading.Thread(target=write)
        writer.start()
        if not beside:
            writer.join()

    @torch.no_grad()
    def read(ids: torch.Tensor) -> torch.Tensor:
        """Text features `[..., L, width]` bf16 of ids `[..., L]`; of no width where the encoder learns, since they change."""
        if trained_text:
            return torch.zeros(*ids.shape, 0, device=run.device)
        with run.autocast():
            return model.text_encoder(ids.flatten(0, -2))[0].unflatten(0, ids.shape[:-1]).bfloat16()

    no_text = read(empty[None])[0]

    def draw():
        """A batch: noisy latents, text features, times, the velocity asked for, the weight of each latent."""
        size = batch_of(batch, cache.frames, sizes)
        chosen = torch.randint(cache.count, (size,), device=run.device)
        wording = torch.randint(WORDINGS, (size,), device=run.device)
        clean = cache.latents[chosen].float()
        dropped = torch.rand(size, 1, device=run.device) < CAPTION_DROPOUT
        if trained_text:
            with run.autocast():
                text = model.text_encoder(torch.where(dropped, empty, cache.ids[chosen, wording]))[0].float()
        else:
            text = torch.where(dropped[:, None], no_text, cache.text[chosen, wording]).float()
        times = torch.randint(scheduler.config.num_train_timesteps, (size,), device=run.device)
        signal = alphas[times].sqrt()[:, None, None, None, None]
        strength = (1 - alphas[times]).sqrt()[:, None, None, None, None]
        noise = torch.randn_like(clean)
        # Shapes cover a tenth of a clip. Only where little noise leaves no doubt about where they are do they weigh more,
        # so that what is expected under much noise keeps unbiased.
        weight = 1 + (args.shape_weight - 1) * signal.square() * cache.masks[chosen]
        return signal * clean + strength * noise, text, times, signal * noise - strength * clean, weight

    def one_step():
        noisy, text, times, wanted, weight = draw()
        square = (predict(noisy, text, times) - wanted).square()
        accelerator.backward((weight * square).mean())
        if run.ranks > 1:
            average_gradients(run, learning)
        accelerator.clip_grad_norm_(learning, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return square.detach().mean()

    def clear() -> None:
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    def clock() -> tuple[float, bool]:
        """Share of the diffusion time that is over, and whether to stop now, as the first process sees it."""
        progress = (spent + time.time() - start) / total
        if args.max_steps:
            progress = max(progress, (step - first_step) / args.max_steps)
        over = progress >= 1 or run.left() < reserve
        if run.ranks > 1:
            progress, over = broadcast(torch.tensor([progress, over], device=run.device, dtype=torch.float64)).tolist()
        return progress, bool(over)

    try:
        while True:
            if run.ranks == 1 or (step - first_step) % CLOCK_EVERY == 0:
                progress, over = clock()
            if over:
                break
            warm = min(1.0, (step - restarted + 1) / args.warmup)
            lr = rate * warm * max(0.005, 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.15) / 0.85))))
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = lr * group["scale"]
            frames = next((f for f, end in phases if progress < end), sizes.latent_frames)
            if cache is None or cache.frames != frames:
                fresh = cache.fresh if cache else 0
                cache = None  # before the next one is made, since both can be gigabytes
                predict = None
                cache = Cache(run, frames, int(time.time()) % 10**7 + 10**8 * run.rank, read)
                first_frames(model.transformer, frames, positions)
                restarted, best = step, math.inf
                log.say(f"diffusion: {frames} latent frames from {100 * progress:.0f} % on, batch "
                        f"{batch_of(batch, frames, sizes)}; {fresh} clips were encoded on the way before")
            try:
                if predict is None:
                    predict = graphed(run, plain, draw()[:3])
                losses.append(one_step())
            except torch.cuda.OutOfMemoryError:
                if run.ranks > 1:  # the others wait for this step
                    raise
                batch, predict = max(8, batch // 2), None
                log.say(f"diffusion: out of memory, batch now {batch}")
                clear()
                continue
            except Exception as error:
                compiled = any(b._compiled_call_impl is not None for b in model.transformer.transformer_blocks)
                if not compiled:
                    raise
                log.say(f"compiled blocks failed, going on without: {type(error).__name__}: {str(error)[:300]}")
                for block in model.transformer.transformer_blocks:
                    block._compiled_call_impl = None
                predict = None
                clear()
                continue
            step += 1
            if refresh_every and step % refresh_every == 0:
                try:
                    cache.add(4 if args.tiny else args.refresh_clips * (4 if frames == 1 else 1))
                except Exception as error:  # the clips at hand still serve
                    log.say(f"no more fresh clips: {type(error).__name__}: {str(error)[:300]}")
                    refresh_every = 0
                    torch.cuda.empty_cache()
            if step % AVERAGE_EVERY == 0:
                decay = min(args.average, (1 + step) / (10 + step)) ** AVERAGE_EVERY
                torch._foreach_lerp_(averages, sources, 1 - decay)
            if step - first_step == 1:
                log.say(f"first step took {time.time() - start:.1f} s")
            if step % 50 == 0 or args.tiny:
                mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
                losses.clear()
                minutes = (spent + time.time() - start) / 60
                settled = step - restarted > args.warmup
                if not math.isfinite(mean) or (settled and mean > WORSE * best):
                    if good is None:
                        raise RuntimeError(f"the loss is {mean:.3g} at step {step}, without good weights before: lower --lr")
                    rate *= 0.6
                    model.load_state_dict(good[0])
                    averaged.load_state_dict(good[1])
                    for optimiser in optimisers:
                        optimiser.optimizer.state.clear()
                    restarted = step
                    log.say(f"diffusion: loss {mean:.3g} at step {step}; back to the last good weights, learning rate {rate:g}")
                    continue
                if settled and mean < best:
                    best = mean
                if good is None or (settled and mean < 1.1 * best and step % 500 == 0):
                    good = tuple({k: v.detach().clone() for k, v in m.state_dict().items()} for m in (model, averaged))
                if predict is not plain and step - restarted in (50, 1000):
                    apart = difference(predict, plain, draw()[:3])
                    log.say(f"after {step - restarted} steps the CUDA graphs lie {apart:.4f} from the plain transformer")
                    if apart >= SAME:
                        predict = plain
                log.row("diffusion", step, minutes, loss=mean, lr=lr)
                if time.time() - shown > 10:
                    per_second = (step - first_step) / (time.time() - start)
                    shown = time.time()
                    log.say(f"diffusion step {step}: loss {mean:.4f}, lr {lr:.1e}, {per_second:.1f} steps/s, {frames} latent "
                            f"frames, {cache.fresh} fresh clips, {cache.count} at hand, {100 * progress:.0f} %")
            if not run.first:
                continue
            if time.time() - saved > args.save_seconds:
                saved = time.time()
                keep(beside=True)
            if time.time() - checked > args.check_seconds and run.left() > reserve + 30:
                checked = time.time()
                try:
                    say_swapped(run, averaged.text_encoder, step, (spent + time.time() - start) / 60)
                    check(run, averaged, step, (spent + time.time() - start) / 60, frames)
                except Exception as error:
                    log.say(f"check failed: {type(error).__name__}: {str(error)[:300]}")
                    torch.cuda.empty_cache()
                log.say(f"check took {time.time() - checked:.1f} s")
                checked = time.time()
    finally:
        keep(beside=False)
        log.say(f"diffusion stops at step {step}, {(spent + time.time() - start) / 60:.2f} minutes in all; model saved")


def batch_of(batch: int, frames: int, sizes) -> int:
    """Clips a step at `frames` latent frames: as many tokens as `batch` whole clips, at most four times the clips."""
    tokens = MAX_TOKENS + frames * sizes.height // 16 * (sizes.width // 16)
    whole = MAX_TOKENS + sizes.latent_frames * sizes.height // 16 * (sizes.width // 16)
    return int(batch * min(4.0, whole / tokens)) // 8 * 8


def model_positions(transformer) -> torch.Tensor:
    """The sincos positions of a whole clip, `[1, text + video tokens, width]`."""
    return transformer.patch_embed.pos_embedding


def first_frames(transformer, frames: int, positions: torch.Tensor) -> None:
    """Make a transformer take the first `frames` latent frames at the positions that they have in a whole clip.

    diffusers computes the same positions anew in every call for a length that is not its own; this saves that."""
    embed = transformer.patch_embed
    tokens = frames * (embed.sample_height // embed.patch_size) * (embed.sample_width // embed.patch_size)
    embed.sample_frames = (frames - 1) * embed.temporal_compression_ratio + 1
    embed.pos_embedding = positions[:, :embed.max_text_seq_length + tokens]


def on_cpu(content):
    """A copy of a state in which every tensor lies on the CPU."""
    if isinstance(content, dict):
        return {key: on_cpu(value) for key, value in content.items()}
    if isinstance(content, list):
        return [on_cpu(value) for value in content]
    return content.detach().to("cpu", copy=True) if isinstance(content, torch.Tensor) else content


def check(run: Run, averaged, step: int, minutes: float, frames: int, count: int = 64) -> None:
    """A quick look in the middle: held-out captions, the averaged weights, guidance 4, clips of `frames` latent frames.

    Motion cannot be judged while clips are short."""
    count = 4 if run.args.tiny else count
    captions = held_out_captions(count, CHECK_SEED)
    ids = torch.from_numpy(Tokens(run.state / "model" / "tokenizer")(captions)).to(run.device)
    videos = sample_quickly(averaged.text_encoder, averaged.transformer, run.vae, build_scheduler(run.sizes), ids,
                            noise_of(count, (frames, *run.sizes.latent_shape[1:]), CHECK_SEED), guidance=4.0,
                            steps=3 if run.args.tiny else 25, autocast=run.autocast, vae_autocast=run.vae_autocast)
    if frames == 1:
        videos = videos.repeat(5, axis=1)  # the scorer asks for as many
    verdicts = run.judges(videos, captions)
    figures = shares(verdicts)
    run.log.say(f"check at step {step}, clips of {frames} latent frames: {percent(figures)}")
    run.log.say(f"colours of one shape and its background: {colour_pairs(verdicts)}")
    run.log.row("check", step, minutes, **figures)
    contact_sheet(videos, captions, verdicts, run.out / "check.png", rows=12)


# --- evaluation -------------------------------------------------------------------------------------------------------


def sample_and_judge(run: Run, pipe, captions: list[str], noise: torch.Tensor, generation: dict, kept: int = 0):
    """Verdicts on videos of all captions, and the first `kept` videos; every process makes its share of them."""
    mine = list(range(run.rank, len(captions), run.ranks))
    said = [captions[i] for i in mine]
    videos = sample_with_pipeline(pipe, said, noise[mine], generation)
    found = [(i, verdict, video if i < kept else None) for i, verdict, video in zip(mine, run.judges(videos, said), videos)]
    found = sorted(gather_object(found) if run.ranks > 1 else found, key=lambda row: row[0])
    return [verdict for _, verdict, _ in found], np.array([video for _, _, video in found[:kept]])


def evaluate(run: Run) -> None:
    """The saved folder through diffusers' pipeline in fp32: sweep the guidance on other held-out captions, then 200."""
    args, log = run.args, run.log
    folder = run.state / "model"
    pipe = load_pipeline(folder, run.device)
    sweep, test = (4, 6) if args.tiny else (args.sweep_captions, args.test_captions)
    generation = json.loads((folder / "generation.json").read_text())
    if args.tiny:
        generation["num_inference_steps"] = 2
    shape = run.sizes.latent_shape
    started = time.time()
    captions, noise, results = held_out_captions(sweep, SWEEP_SEED), noise_of(sweep, shape, SWEEP_SEED), {}
    for guidance in args.guidance if len(args.guidance) > 1 else ():
        verdicts, _ = sample_and_judge(run, pipe, captions, noise, {**generation, "guidance_scale": guidance})
        results[guidance] = shares(verdicts)
        log.say(f"guidance {guidance:g}, {sweep} captions: {percent(results[guidance])}")
        if run.ranks == 1 and run.left() < 40 and len(results) > 1:
            break
    best = max(results, key=lambda g: (sum(results[g][p] for p in PARTS), -g)) if results else args.guidance[0]
    generation["guidance_scale"] = best
    captions = held_out_captions(test, TEST_SEED)
    verdicts, videos = sample_and_judge(run, pipe, captions, noise_of(test, shape, TEST_SEED), generation, kept=24)
    if not run.first:
        return
    figures = shares(verdicts)
    log.say(f"TEST, {test} held-out captions, {generation['num_inference_steps']} steps, guidance {best:g}: {percent(figures)}")
    log.say(f"of one shape: {colour_pairs(verdicts)}")
    psnr, seen = reconstruct(run, pipe.vae, 8 if args.tiny else 96)
    log.say(f"vae as saved: {psnr:.2f} dB on held-out clips, {percent(seen)}; evaluation took {time.time() - started:.0f} s")
    if not args.tiny:
        write_generation(folder, generation)
    contact_sheet(videos, captions, verdicts, run.out / "contact_sheet.png")
    for i in range(min(6, test)):
        save_gif(videos[i], run.out / f"sample_{i}.gif")
    record = {
        "captions": test, "generation": generation, "adherence": figures, "vae_psnr_db": psnr, "vae_adherence": seen,
        "colour_pairs": colour_pairs(verdicts),
        "guidance_sweep": {str(g): r for g, r in results.items()}, "device": device_name(run.device),
        "torch": torch.__version__, "dtype": "float32",
        "missed": [{"caption": c, "seen": str(v.scene), "parts": [p for p in PARTS if not getattr(v, p)]}
                   for c, v in zip(captions, verdicts) if not v.all]}
    (run.out / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")


def device_name(device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def plot(run: Run) -> None:
    """Loss, autoencoder PSNR and adherence over the minutes, from the log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, str], list] = {}
    with open(run.log.path, newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault((row["stage"], row["name"]), []).append((float(row["minutes"]), float(row["value"])))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = ((axes[0], "autoencoder, PSNR of training batches (dB)", [("vae", "psnr_db")]),
              (axes[1], "v-prediction loss", [("diffusion", "loss")]),
              (axes[2], "64 held-out captions, share met", [("check", p) for p in PARTS]))
    for axis, title, names in panels:
        for name in names:
            if name in curves:
                x, y = zip(*curves[name])
                axis.plot(x, y, label=name[1], marker="o" if name[0] == "check" else None, linewidth=1)
        axis.set(title=title, xlabel="minutes")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    if axes[2].lines:
        axes[2].legend()
    figure.savefig(run.out / "training.png", dpi=100)
    (run.out / "training_log.csv").write_text(run.log.path.read_text())


def pack_model(run: Run) -> None:
    """Put the model folder into `model.tar.NN` parts in the out folder (`cat model.tar.* | tar x` unpacks them)."""
    folder = run.state / "model"
    if folder.exists():
        whole = run.state / "model.tar"
        with tarfile.open(whole, "w") as archive:
            archive.add(folder, "model")
        data = whole.read_bytes()
        for old in run.out.glob("model.tar.*"):
            old.unlink()
        for number, start in enumerate(range(0, len(data), PART_BYTES)):
            (run.out / f"model.tar.{number:02d}").write_bytes(data[start:start + PART_BYTES])


def pack(run: Run) -> None:
    """The model's parts, and every small result in `results.tar`."""
    pack_model(run)
    small = [p for p in run.out.iterdir() if p.suffix in (".png", ".gif", ".json", ".csv", ".txt", ".md")]
    with tarfile.open(run.out / "results.tar", "w") as archive:
        for path in small:
            archive.add(path, path.name)
    for path in small:
        path.unlink()
    left = ", ".join(f"{p.name} {p.stat().st_size / 1e6:.1f} MB" for p in sorted(run.out.iterdir()))
    run.log.say(f"in the out folder: {left}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="which to run, of " + ",".join(STAGES))
    parser.add_argument("--minutes", type=float, default=9.0, help="wall clock of this run")
    parser.add_argument("--vae-minutes", type=float, default=3.0, help="of the autoencoder, over all runs")
    parser.add_argument("--diffusion-minutes", type=float, default=11.0, help="of text encoder and transformer, over all runs")
    parser.add_argument("--evaluate-seconds", type=float, default=60.0, help="kept back at the end of the run")
    parser.add_argument("--latent-seconds", type=float, default=50.0, help="at most, for encoding clips")
    parser.add_argument("--state", default="outputs/small_state", help="folder of checkpoints")
    parser.add_argument("--out", default="outputs/small", help="folder of results")
    parser.add_argument("--init", help="model folder to go on from where the state folder is empty")
    parser.add_argument("--init-parts", default="vae,transformer", help="what to take from it, of vae, transformer, "
                        "text_encoder; the rest is trained from nothing (default: %(default)s)")
    parser.add_argument("--curriculum", help="latent frames and shares of the diffusion time, the last of them a whole clip's "
                        "(default: 1:0.13,9:0.87)")
    parser.add_argument("--text-rate", type=float, default=0.0, help="the text encoder's learning rate beside the transformer, "
                        "as a share of --lr (0: it stays as the words stage left it)")
    parser.add_argument("--refresh-every", type=int, default=20, help="steps after which new clips are encoded (0: never)")
    parser.add_argument("--refresh-clips", type=int, default=32, help="how many each time; four times as many single frames")
    parser.add_argument("--unfinished", action="store_true",
                        help="more runs follow: the learning rate falls over all of --diffusion-minutes, not this run's share")
    parser.add_argument("--words-seconds", type=float, default=14.0, help="of the text encoder alone (0: none)")
    parser.add_argument("--words-lr", type=float, default=2e-3)
    parser.add_argument("--word-captions", type=int, default=120_000)
    parser.add_argument("--word-batch", type=int, default=1024)
    parser.add_argument("--clips", type=int, default=40_000)
    parser.add_argument("--fresh-clips", action="store_true", help="encode other clips than the run before")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--no-muon", dest="muon", action="store_false", help="AdamW for the transformer's inner matrices too")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="launch every kernel by itself")
    parser.add_argument("--shape-weight", type=float, default=3.0, help="weight of the latents on shapes where noise is little")
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--average", type=float, default=0.999, help="decay of the weight average")
    parser.add_argument("--vae-goes-on", action="store_true", help="train the autoencoder of --init further, for --vae-minutes")
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--vae-lr", type=float, default=1.5e-3)
    parser.add_argument("--kl-weight", type=float, default=2e-4)
    parser.add_argument("--check-seconds", type=float, default=140.0)
    parser.add_argument("--save-seconds", type=float, default=180.0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.5, 4.0, 6.0])
    parser.add_argument("--sweep-captions", type=int, default=64)
    parser.add_argument("--test-captions", type=int, default=200)
    parser.add_argument("--max-steps", type=int, default=0, help="of each training stage in this run (0: time decides)")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--pack", action="store_true", help="leave the results as a few files of under 16 MB")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that everything runs")
    args = parser.parse_args(argv)
    args.stages = args.stages.split(",")
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}")
    args.init_parts = args.init_parts.split(",")
    if unknown := set(args.init_parts) - {"vae", "transformer", "text_encoder"}:
        parser.error(f"unknown --init-parts {sorted(unknown)}; there are vae, transformer, text_encoder")
    if args.words_seconds <= 0 and args.text_rate <= 0 and "text_encoder" not in args.init_parts:
        parser.error("--words-seconds 0 leaves the text encoder untrained: give --text-rate, say 0.1")
    most = (TINY if args.tiny else SIZES).latent_frames
    args.curriculum = args.curriculum or f"1:0.13,{most}:0.87"
    try:
        curriculum(args.curriculum, most)
    except ValueError as error:
        parser.error(str(error))
    if args.tiny:
        args.clips, args.word_captions = min(args.clips, 96), min(args.word_captions, 500)
    return args


def prepare(run: Run) -> None:
    """Write the vocabulary, and set workers to what the stages will ask for."""
    args, workers = run.args, run.judges.pool
    run.tokenizer = run.state / "model" / "tokenizer"
    with run.accelerator.main_process_first():
        build_vocabulary(run.tokenizer)
    run.vocabulary = len(Tokens(run.tokenizer))
    if workers and ("latents" in args.stages or "diffusion" in args.stages):
        if args.fresh_clips or not run.own("latents.npy").exists():
            run.ahead = workers.apply_async(plan_ahead, (run.tokenizer, share_of_clips(run), clip_seed(run)))
    if workers and run.first and "words" in args.stages and not (run.state / "diffusion.pt").exists():
        run.word_sets = workers.apply_async(word_sets, (run.tokenizer, args.word_captions))


def stages(run: Run) -> None:
    """Everything that was asked for, in order. One process trains autoencoder and words, all of them the transformer."""
    asked, accelerator = set(run.args.stages), run.accelerator
    if {"vae", "latents", "diffusion"} & asked:
        with accelerator.main_process_first():
            train_vae(run)
    if {"latents", "diffusion"} & asked:
        make_latents(run)
    if "words" in asked:
        with accelerator.main_process_first():
            train_words(run)
    if "diffusion" in asked:
        train_diffusion(run)
        run.latents = run.masks = None
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    if "evaluate" in asked:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        evaluate(run)


def main(argv=None) -> int:
    args = arguments(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    judges = Judges(1 if args.tiny else max(2, min(16, (os.cpu_count() or 1) // processes)))  # forked before CUDA starts
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    run = Run(args, accelerator, judges)
    run.log.say(f"{run.ranks} x {device_name(run.device)}, torch {torch.__version__}, {args.minutes:g} minutes")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    code = 0
    try:
        prepare(run)
        stages(run)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    finally:
        for last in ((plot, pack) if args.pack else (plot,)) if run.first else ():
            try:
                last(run)
            except Exception:
                traceback.print_exc()
                code = code or 1
        judges.close()
    run.log.say(f"finished with {code}")
    if code == 0:
        accelerator.end_training()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
