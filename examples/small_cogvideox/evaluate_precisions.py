"""What does low-bit attention cost the small model? PSNR, SSIM and adherence per precision, on an NVIDIA GPU.

    python examples/small_cogvideox/evaluate_precisions.py --model outputs/small_state/model --out outputs/precisions.json

The same start noise for every precision; held-out captions; the reference is the same model in float32 with diffusers' own
attention, and a second column compares with the fp16 model. Every row but fp32 and fp16 runs in fp16 with
`LowBitAttnProcessor` in all attention modules. Writes the JSON row by row and a table (.md) beside it. Several processes
can share the work, each with its `--precisions` and both baselines of its own; `--merge a.json b.json` joins what they wrote.
"""
from __future__ import annotations

import argparse
import json
import math
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import torch
from models import load_pipeline
from sampling import Judges, held_out_captions, noise_of, percent, sample_with_pipeline, shares

from lowbit_video.eval.metrics.psnr import psnr
from lowbit_video.eval.metrics.ssim import ssim
from lowbit_video.eval.report.bootstrap import bootstrap
from lowbit_video.eval.world import judge
from lowbit_video.pipelines.shared.generation import read_stored

PRECISIONS = ("fp16", "int8+fp16", "int8+fp8", "int4+fp16", "int4+fp8", "int2+fp16")
CAPTION_SEED = 4000  # the first captions of the 200 that the card's adherence is measured on


def figures_of(video, caption, reference, half):
    """One video: the scorer's verdict; PSNR (dB) and SSIM against the reference, PSNR (dB) against fp16, or None."""
    verdict = judge.score(video, caption)
    if reference is None:
        return verdict, None
    pairs = ((psnr, reference), (ssim, reference), (psnr, half))
    return verdict, tuple(float(metric(video, other).mean()) for metric, other in pairs)


def interval(values) -> dict:
    found = bootstrap(lambda x: x.mean(-1), values)
    return {"mean": found.value, "low": found.low, "high": found.high}


def markdown(record: dict) -> str:
    """The card's table."""

    def cell(figures: dict, digits: int) -> str:
        return f"{figures['mean']:.{digits}f} ({figures['low']:.{digits}f}..{figures['high']:.{digits}f})"

    lines = ["| attention | PSNR, dB | SSIM | PSNR against fp16, dB | colour | shape | motion | background |",
             "|---|---|---|---|---|---|---|---|"]
    for name, row in record["rows"].items():
        if "error" in row:
            lines.append(f"| {name} | failed: {row['error'].splitlines()[0][:80]} | | | | | | |")
            continue
        paired = [cell(row[key], digits) if key in row else "-"
                  for key, digits in (("psnr_db", 1), ("ssim", 4), ("psnr_to_fp16_db", 1))]
        parts = [f"{100 * row['adherence'][p]:.0f} %" for p in ("colour", "shape", "motion", "background")]
        lines.append(f"| {name} | " + " | ".join(paired + parts) + " |")
    lines += ["", f"{record['captions']} held-out captions, {record['generation']['num_inference_steps']} DDIM steps, guidance "
              f"{record['generation']['guidance_scale']:g}, same noise; mean (95 % interval by bootstrap over captions); "
              f"backend {record['backend']} on {record['device']}."]
    return "\n".join(lines) + "\n"


def merge(parts: list[dict]) -> dict:
    """One record of several processes' records, rows in the order of PRECISIONS.

    Raises:
        ValueError: they were made with other captions, settings or another reference."""
    first = parts[0]
    for part in parts[1:]:
        for key in ("captions", "generation", "backend"):
            if part[key] != first[key]:
                raise ValueError(f"cannot merge: {key} is {first[key]} in one and {part[key]} in another; run both alike")
    rows = {}
    for part in parts:
        for name, row in part["rows"].items():
            if name not in rows or "error" in rows[name]:
                rows[name] = row
    order = [name for name in ("fp32", *PRECISIONS) if name in rows] + [n for n in rows if n not in ("fp32", *PRECISIONS)]
    same = all(part["videos_crc32"] == first["videos_crc32"] for part in parts)
    return {**first, "rows": {name: rows[name] for name in order}, "baselines_identical": same}


def write(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--out", type=Path, default=Path("outputs/precisions.json"))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="only join these into --out")
    parser.add_argument("--captions", type=int, default=50)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.merge:
        record = merge([json.loads(path.read_text()) for path in args.merge])
        write(record, args.out)
        print(markdown(record), flush=True)
        return 0
    started = time.time()
    judges = Judges()  # forked before CUDA starts
    from lowbit_video import LowBitAttnProcessor

    generation = read_stored(args.model)
    generation["num_inference_steps"] = args.steps or generation["num_inference_steps"]
    captions = held_out_captions(args.captions, CAPTION_SEED)
    pipe = load_pipeline(args.model, args.device, torch.float32)
    shape = ((generation["num_frames"] - 1) // 4 + 1, pipe.transformer.config.in_channels, generation["height"] // 8,
             generation["width"] // 8)
    noise = noise_of(args.captions, shape, CAPTION_SEED)
    cuda = args.device.startswith("cuda")
    record = {"captions": args.captions, "generation": generation, "backend": args.backend, "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if cuda else "cpu", "videos_crc32": {}, "rows": {}}
    pending = {}  # name -> (seconds of sampling, the workers' answer): scored while the GPU goes on

    def sample(name: str, references=None, halves=None):
        start = time.time()
        videos = sample_with_pipeline(pipe, captions, noise, generation, args.batch)
        seconds = time.time() - start
        print(f"[{time.time() - started:5.1f} s] {name} sampled in {seconds:.1f} s", flush=True)
        nothing = [None] * len(videos)
        halves = nothing if references is None else videos if halves is None else halves
        work = list(zip(videos, captions, nothing if references is None else references, halves))
        answer = judges.pool.starmap_async(figures_of, work, chunksize=2) if judges.pool else [figures_of(*w) for w in work]
        pending[name] = seconds, answer
        return videos

    def collect(wait: bool) -> None:
        for name, (seconds, answer) in list(pending.items()):
            if not isinstance(answer, list):
                if not wait and not answer.ready():
                    continue
                answer = answer.get(180)
            del pending[name]
            row = {"adherence": shares([verdict for verdict, _ in answer]), "seconds": seconds}
            if answer[0][1] is not None:
                for key, values in zip(("psnr_db", "ssim", "psnr_to_fp16_db"), np.array([f for _, f in answer]).T):
                    if (name, key) != ("fp16", "psnr_to_fp16_db"):
                        row[key] = interval(values)
            record["rows"][name] = row
            print(f"[{time.time() - started:5.1f} s] {name}: {percent(row['adherence'])}  PSNR "
                  f"{row['psnr_db']['mean'] if 'psnr_db' in row else math.nan:.2f} dB", flush=True)
            write(record, args.out)

    code = 0
    references = sample("fp32")
    record["videos_crc32"]["fp32"] = zlib.crc32(references.tobytes())
    pipe = load_pipeline(args.model, args.device, torch.float16 if cuda else torch.float32)
    halves = sample("fp16", references)
    record["videos_crc32"]["fp16"] = zlib.crc32(halves.tobytes())
    for name in args.precisions:
        if name == "fp16":
            continue  # a baseline, made already
        try:
            pipe.transformer.set_attn_processor(LowBitAttnProcessor(name, backend=args.backend))
            sample(name, references, halves)
        except Exception as error:
            traceback.print_exc()
            record["rows"][name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            code = 1
        collect(wait=False)
    collect(wait=True)
    write(record, args.out)
    judges.close()
    print(markdown(record), flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
