"""The stage `vae`: train the autoencoder, and see what is left of held-out clips that went through it."""
from __future__ import annotations

import copy
import math
import time

import numpy as np
import torch
from clips import ClipPool, as_uint8
from curriculum import curriculum
from models import build_vae, rescale_latents
from run import Run, save_state
from sampling import percent, shares

TRAIN_SEED, CHECK_SEED = 1000, 2000
VAE_CLIPS = {"shapes": 8000, "scenes": 2000}  # the long world's plans take longer


def vae_batch(run: Run, pool: ClipPool, rng, batch: int, frames: int, whole: bool, shrink: int = 1):
    """Clips for one step: windows of `frames`; whole frames, or a quarter of each near its first shape. Height and width are
    divided by `shrink`."""
    height, width = run.sizes.height // shrink, run.sizes.width // shrink
    first = int(rng.integers(0, run.sizes.frames - frames + 1))
    index = rng.integers(0, len(pool), batch)
    video, mask = pool.paint(index, first, frames, height)
    if whole:
        return video, mask
    rows = np.searchsorted(pool.plan.clip, index)
    unit = height / pool.world.height
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
    pool = ClipPool(count, CHECK_SEED, run.device, True, run.sizes.world)
    found, videos = [], []
    for part in np.array_split(np.arange(count), max(1, count // (8 if run.sizes.world == "shapes" else 2))):
        video, _ = pool.paint(part, 0, run.sizes.frames, run.sizes.height)
        with run.vae_autocast():
            videos.append(as_uint8(vae.decode(vae.encode(video).latent_dist.mode()).sample))
        error = videos[-1].astype(np.float32) - as_uint8(video).astype(np.float32)
        found += [10 * math.log10(255.0**2 / max(e, 1e-9)) for e in np.square(error).mean((1, 2, 3, 4))]
    for texture in pool.world.textures:
        rows = [i for i, meaning in enumerate(pool.meanings) if meaning.texture == texture]
        if rows:
            run.log.say(f"vae on {len(rows)} {texture} backgrounds: {np.mean(np.array(found)[rows]):.2f} dB")
    return float(np.mean(found)), shares(run.judges(np.concatenate(videos), pool.captions(1), run.sizes.world))


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
    clips = 64 if args.tiny else VAE_CLIPS[run.sizes.world]
    pool = run.vae_pool.get() if run.vae_pool else ClipPool(clips, TRAIN_SEED, "cpu", of=run.sizes.world)
    pool.device = run.device
    small, large = (4, 2) if args.tiny else (args.vae_batch, args.vae_batch // 4)
    short, long = 9, 17
    smaller = sorted({p.shrink for p in curriculum(args.curriculum, run.sizes.latent_frames) if p.shrink > 1}) or [1]
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
            shrink = smaller[step // 2 % len(smaller)] if step % 2 else 1  # every second step as small as training's clips
            clips = large * shrink**2 if whole else max(1, small * shrink**2 // 4) if shrink > 1 else small
            video, mask = vae_batch(run, pool, rng, clips, long if whole else short, whole or shrink > 1, shrink)
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
        parts = []
        for part in np.split(np.arange(min(len(pool), 64)), 16):
            video, _ = pool.paint(part, 0, run.sizes.frames, run.sizes.height)
            with run.vae_autocast():
                parts.append(vae.encode(video).latent_dist.mode().float())
        latents = torch.cat(parts)
    spread = latents.std((0, 2, 3, 4)).clamp_min(0.05)
    rescale_latents(vae, spread)
    save_state(path, {"model": vae.state_dict(), "optimiser": {}, "finished": True, "seconds": total, "step": step,
                      "bf16": run.vae_bf16})
    psnr, seen = reconstruct(run, vae, 4 if args.tiny else 48 if run.sizes.world == "shapes" else 24)
    log.say(f"vae done after {step} steps: held-out clips {psnr:.2f} dB, {percent(seen)}; latent spread was "
            f"{spread.min():.3f}..{spread.max():.3f}")
    log.row("vae", step, total / 60, held_out_psnr_db=psnr, **{f"held_out_{part}": share for part, share in seen.items()})
    run.vae = vae
