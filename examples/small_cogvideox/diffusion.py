"""The stage `diffusion`: the transformer learns v-prediction on encoded clips, short ones first."""
from __future__ import annotations

import copy
import json
import math
import threading
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast
from curriculum import batch_of, curriculum, first_frames, model_positions, rotations
from evaluation import check
from graphs import SAME, Predict, difference, graphed
from latents import WORDINGS, Cache
from loss_watch import LossWatch
from models import (
    TextToVelocity,
    build_scheduler,
    build_text_encoder,
    build_transformer,
    describe,
    generation_defaults,
    initialise,
    save,
)
from optimisers import StackedMuon
from outputs import pack_model
from run import Run, on_cpu, save_state
from words import say_swapped

AVERAGE_EVERY = 4  # steps
CLOCK_EVERY = 10  # steps, where several processes have to agree on the time
CAPTION_DROPOUT = 0.1


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


def average_gradients(run: Run, parameters: list[torch.Tensor]) -> None:
    """The mean of all processes' gradients, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = run.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(mean.split([g.numel() for g in gradients]), gradients)])


def draw_times(count: int, steps: int, shift: float, device) -> torch.Tensor:
    """Times int64 `[count]` in 0..steps - 1; a `shift` of 1 draws all alike, more of it draws much noise oftener.

    Source: the timestep shift of Esser et al., "Scaling Rectified Flow Transformers", 2024 (arXiv:2403.03206), eq. 23."""
    share = torch.rand(count, device=device, dtype=torch.float64)
    return (steps * shift * share / (1 + (shift - 1) * share)).long().clamp_max(steps - 1)


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
    spent, step, earlier = 0.0, 0, 0.0
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
    batch, halved = min(8, args.batch) if args.tiny else args.batch, 1
    most = 8 if args.tiny else 10**6  # clips a step, whatever the curriculum says
    phases = curriculum(args.curriculum, sizes.latent_frames)
    cache, positions = None, model_positions(model.transformer)
    plain = predict = None
    empty = torch.zeros(sizes.text_tokens, dtype=torch.long, device=run.device)
    empty[0] = 1
    accelerator.wait_for_everyone()
    start = saved = checked = shown = time.time()
    first_step, rate, losses, refresh_every = step, args.lr, [], args.refresh_every
    watch, good = LossWatch(), None  # losses of this clip length, weights to go back to
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
        """Text features `[..., L, width]` bf16 of ids `[..., L]`; the ids where the encoder learns, since features change."""
        if trained_text:
            return ids
        with run.autocast():
            return model.text_encoder(ids.flatten(0, -2))[0].unflatten(0, ids.shape[:-1]).bfloat16()

    no_caption = read(empty[None])[0]

    def draw():
        """A batch: noisy latents, text features, times, the velocity asked for, the weight of each latent."""
        size = max(1, min(batch_of(batch, cache.phase, sizes), most) // halved)
        chosen = torch.randint(cache.count, (size,), device=run.device)
        wording = torch.randint(WORDINGS, (size,), device=run.device)
        clean = cache.latents[chosen].float()
        dropped = torch.rand(size, *no_caption.ndim * [1], device=run.device) < CAPTION_DROPOUT
        text = torch.where(dropped, no_caption, cache.captions[chosen, wording])
        if trained_text:
            with run.autocast():
                text = model.text_encoder(text)[0]
        text = text.float()
        times = draw_times(size, scheduler.config.num_train_timesteps, args.time_shift, run.device)
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
            phase = next((p for p in phases if progress < p.end), phases[-1])
            frames = phase.frames
            if cache is None or cache.phase != phase:
                fresh = cache.fresh if cache else 0
                cache = None  # before the next one is made, since both can be gigabytes
                predict = None
                torch.cuda.empty_cache()
                cache = Cache(run, phase, int(time.time()) % 10**7 + 10**8 * run.rank, read)
                first_frames(model.transformer, frames, positions)
                plain = Predict(model.transformer, rotations(sizes, frames, phase.shrink, run.device))
                restarted, watch = step, LossWatch()
                log.say(f"diffusion: {frames} latent frames{f' of 1/{phase.shrink} size' if phase.shrink > 1 else ''} from "
                        f"{100 * progress:.0f} % on, batch {batch_of(batch, phase, sizes)}; {fresh} clips were encoded on the "
                        "way before")
            warm = min(1.0, (step - restarted + 1) / args.warmup)
            lr = rate * warm * max(0.005, 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.15) / 0.85))))
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = lr * group["scale"]
            try:
                if predict is None:
                    predict = graphed(run, plain, draw()[:3])
                losses.append(one_step())
            except torch.cuda.OutOfMemoryError:
                if run.ranks > 1 or halved >= 32:  # the others wait for this step; it will not get better
                    raise
                halved, predict = 2 * halved, None
                log.say(f"diffusion: out of memory, batches now {halved} times smaller")
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
                    cache.add(4 if args.tiny else args.refresh_clips * (4 if frames == 1 else 1) * phase.shrink)
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
                if not math.isfinite(mean) or (settled and watch.lost(mean)):
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
                if good is None or (settled and mean < 1.1 * watch.best and step % 500 == 0):
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
                    check(run, averaged, step, (spent + time.time() - start) / 60, phase)
                except Exception as error:
                    log.say(f"check failed: {type(error).__name__}: {str(error)[:300]}")
                    torch.cuda.empty_cache()
                log.say(f"check took {time.time() - checked:.1f} s")
                checked = time.time()
    finally:
        keep(beside=False)
        log.say(f"diffusion stops at step {step}, {(spent + time.time() - start) / 60:.2f} minutes in all; model saved")
