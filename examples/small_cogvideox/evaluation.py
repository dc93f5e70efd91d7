"""The stage `evaluate`, and the quick look in the middle of the training."""
from __future__ import annotations

import itertools
import json
import time

import numpy as np
import torch
from accelerate.utils import gather_object
from autoencoder import reconstruct
from curriculum import Phase, rotations
from models import build_scheduler, load_pipeline, write_generation
from run import Run, device_name
from sampling import (
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
from tokens import Tokens

from lowbit_video.pipelines.shared.generation import read_stored

BATCH = 50  # captions that are sampled and judged at once
CHECK_SEED, SWEEP_SEED, TEST_SEED = 2000, 3000, 4000


def check(run: Run, averaged, step: int, minutes: float, phase: Phase, count: int = 64) -> None:
    """A quick look in the middle: held-out captions, the averaged weights, guidance 4, clips of the phase's size.

    Motion cannot be judged while clips are short."""
    frames, channels, height, width = run.sizes.latent_shape
    shape = (phase.frames, channels, height // phase.shrink, width // phase.shrink)
    count = 4 if run.args.tiny else count if np.prod(shape) * count < 12e6 else 12
    captions = held_out_captions(count, CHECK_SEED, run.sizes.world)
    ids = torch.from_numpy(Tokens(run.state / "model" / "tokenizer")(captions)).to(run.device)
    videos = sample_quickly(averaged.text_encoder, averaged.transformer, run.vae, build_scheduler(run.sizes), ids,
                            noise_of(count, shape, CHECK_SEED), guidance=4.0,
                            steps=3 if run.args.tiny else 25, autocast=run.autocast, vae_autocast=run.vae_autocast,
                            rotations=rotations(run.sizes, phase.frames, phase.shrink, run.device))
    if phase.frames == 1:
        videos = videos.repeat(5, axis=1)  # the scorer asks for as many
    verdicts = run.judges(videos, captions, run.sizes.world)
    figures = shares(verdicts)
    run.log.say(f"check at step {step}, clips of {phase.frames} latent frames: {percent(figures)}")
    run.log.say(f"colours of one shape and its background: {colour_pairs(verdicts)}")
    run.log.row("check", step, minutes, **figures)
    contact_sheet(videos, captions, verdicts, run.out / "check.png", rows=12)


def sample_and_judge(run: Run, pipe, captions: list[str], noise: torch.Tensor, generation: dict, kept: int = 0):
    """Verdicts on videos of all captions, and the first `kept` videos; every process makes its share of them."""
    mine = list(range(run.rank, len(captions), run.ranks))
    said = [captions[i] for i in mine]
    found, batch = [], BATCH if run.sizes.world == "shapes" else 8
    for start in range(0, len(said), BATCH):  # of long clips, whose frames take gigabytes, a few at a time
        part = slice(start, start + BATCH)
        videos = sample_with_pipeline(pipe, said[part], noise[mine[part]], generation, batch)
        verdicts = run.judges(videos, said[part], run.sizes.world) or [None] * len(videos)
        found += [(i, verdict, video if i < kept else None) for i, verdict, video in zip(mine[part], verdicts, videos)]
    found = sorted(gather_object(found) if run.ranks > 1 else found, key=lambda row: row[0])
    return [verdict for _, verdict, _ in found if verdict], np.array([video for _, _, video in found[:kept]])


def evaluate(run: Run) -> None:
    """The saved folder through diffusers' pipeline in fp32: sweep guidance and steps on other held-out captions, then 200."""
    args, log = run.args, run.log
    folder = run.state / "model"
    dtype = torch.float32 if run.sizes.world == "shapes" or run.device.type == "cpu" else torch.bfloat16
    pipe = load_pipeline(folder, run.device, dtype)
    sweep, test = (4, 6) if args.tiny else (args.sweep_captions, args.test_captions)
    generation = read_stored(folder)
    if args.tiny:
        generation["num_inference_steps"] = 2
    shape = run.sizes.latent_shape
    started = time.time()
    captions, noise, results = held_out_captions(sweep, SWEEP_SEED, run.sizes.world), noise_of(sweep, shape, SWEEP_SEED), {}
    choices = list(itertools.product(args.sampling_steps or [generation["num_inference_steps"]], args.guidance))
    for steps, guidance in choices if len(choices) > 1 else ():
        asked = {**generation, "guidance_scale": guidance, "num_inference_steps": steps}
        verdicts, _ = sample_and_judge(run, pipe, captions, noise, asked)
        results[steps, guidance] = shares(verdicts)
        log.say(f"{steps} steps, guidance {guidance:g}, {sweep} captions: {percent(results[steps, guidance])}")
        if run.ranks == 1 and run.left() < 40 and len(results) > 1:
            break
    best = choices[0]
    if results:  # of equals the one with fewer steps and less guidance
        best = max(results, key=lambda c: (sum(results[c][p] for p in results[c] if p != "all"), -c[0], -c[1]))
    generation["num_inference_steps"], generation["guidance_scale"] = best
    captions = held_out_captions(test, TEST_SEED, run.sizes.world)
    verdicts, videos = sample_and_judge(run, pipe, captions, noise_of(test, shape, TEST_SEED), generation, kept=24)
    if not run.first:
        return
    figures = shares(verdicts)
    log.say(f"TEST, {test} held-out captions, {best[0]} steps, guidance {best[1]:g}: {percent(figures)}")
    log.say(f"of one shape: {colour_pairs(verdicts)}")
    psnr, seen = reconstruct(run, pipe.vae.float(), 4 if args.tiny else 96 if run.sizes.world == "shapes" else 24)
    log.say(f"vae as saved: {psnr:.2f} dB on held-out clips, {percent(seen)}; evaluation took {time.time() - started:.0f} s")
    if not args.tiny:
        write_generation(folder, generation)
    record = {
        "captions": test, "generation": generation, "adherence": figures, "vae_psnr_db": psnr, "vae_adherence": seen,
        "colour_pairs": colour_pairs(verdicts),
        "sweep": [{"num_inference_steps": s, "guidance_scale": g, **found} for (s, g), found in results.items()],
        "device": device_name(run.device),
        "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch."),
        "missed": [{"caption": c, "seen": str(v.scene), "parts": [p for p in v.parts if not getattr(v, p)]}
                   for c, v in zip(captions, verdicts) if not v.all]}
    (run.out / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    contact_sheet(videos, captions, verdicts, run.out / "contact_sheet.png")
    for i in range(min(6, test)):
        save_gif(videos[i], run.out / f"sample_{i}.gif")
