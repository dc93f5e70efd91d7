"""How often is the scorer right on true renders of held-out captions, as they are and as an autoencoder of 30 dB leaves them?

    python -m lowbit_video.eval.world.measure_judge --world scenes --captions 200 --workers 4 --out judge.json

Prints every miss and writes the share of right verdicts of each question, and seconds of one core a clip.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import numpy as np

from lowbit_video.files import write_json
from lowbit_video.kernels.blas_threads import one_blas_thread

from . import judge
from .captions import caption_of
from .motion import plan
from .painting import render
from .scene import HEIGHT, WORLDS, draw_meanings

SIGMA = 0.65  # of the blur, in pixels of a frame 128 high
PSNR_DB = 30.0  # noise is added up to it


def as_uint8(frames: np.ndarray) -> np.ndarray:
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def softened(frames: np.ndarray, seed: int, sigma: float) -> np.ndarray:
    """Frames `[F, H, W, 3]` in 0..255 under a Gaussian of `sigma` pixels, and white noise until they are PSNR_DB from what they
    were; without noise where the blur alone takes them farther."""
    soft = np.asarray(frames, np.float32)
    for axis in (1, 2):
        place = np.arange(soft.shape[axis])
        matrix = np.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2)).astype(np.float32)
        matrix /= matrix.sum(1, keepdims=True)
        soft = np.moveaxis(np.tensordot(matrix, soft, (1, axis)), 0, axis)
    left = 255.0**2 / 10 ** (PSNR_DB / 10) - float(np.square(soft - frames).mean())
    return as_uint8(soft + np.random.default_rng(seed).normal(0, max(left, 0) ** 0.5, soft.shape))


def judged(number: int, world: str, seed: int, count: int, height: int) -> dict:
    """The verdicts on one caption: parts missed of the true and of the softened render, and seconds of the scorer."""
    of = WORLDS[world]
    meanings = draw_meanings(count, seed, held=True, world=of)
    rng = np.random.default_rng(seed + 1)
    caption = [caption_of(meaning, rng) for meaning in meanings][number]
    found = {"caption": caption, "seconds": []}
    placed = plan([meanings[number]], seed + number, height=height, world=of)
    with one_blas_thread():
        frames = render(placed, height, height * of.width // of.height)[0]
        for kind, video in (("true", as_uint8(frames)), ("soft", softened(frames, number, SIGMA * height / HEIGHT))):
            begun = time.process_time()
            verdict = judge.score(video, caption, of)
            found["seconds"].append(time.process_time() - begun)
            found["parts"] = verdict.parts
            found[kind] = [part for part in verdict.parts if not getattr(verdict, part)]
            if found[kind]:
                print(f"{kind}: missed {', '.join(found[kind])} of {caption!r}: {verdict.scene}", flush=True)
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=tuple(WORLDS), default="scenes")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4000)
    parser.add_argument("--height", type=int, help="of the clips; default: the world's own")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("outputs/judge.json"))
    args = parser.parse_args(argv)
    height = args.height or WORLDS[args.world].height
    work = partial(judged, world=args.world, seed=args.seed, count=args.captions, height=height)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        found = pool.map(work, range(args.captions), chunksize=1)
    shares = {kind: {part: float(np.mean([part not in one[kind] for one in found])) for part in found[0]["parts"]}
              for kind in ("true", "soft")}
    record = {"world": args.world, "captions": args.captions, "seed": args.seed, "height": height, "right": shares,
              "soft": {"sigma_of_128": SIGMA, "psnr_db": PSNR_DB},
              "seconds_a_clip": {"median": float(np.median([one["seconds"] for one in found])),
                                 "most": float(np.max([one["seconds"] for one in found]))}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, record)
    print(record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
