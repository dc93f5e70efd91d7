"""What does low-bit attention cost the small model? PSNR, SSIM and adherence per precision, on an NVIDIA GPU.

    python examples/small_cogvideox/evaluate_precisions.py --model examples/small_cogvideox/model --out outputs/precisions

The same start noise for every precision; held-out captions; the reference is the same model in float32 with diffusers' own
attention, and a second column compares with the fp16 model. Every row but the first runs in fp16 with
`LowBitAttnProcessor` in all attention modules. Writes precisions.json and precisions.md, row by row.
"""
from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from lowbit_video.eval.bootstrap import bootstrap
from lowbit_video.eval.psnr import psnr
from lowbit_video.eval.ssim import ssim
from models import load_pipeline
from sampling import Judges, contact_sheet, held_out_captions, noise_of, percent, sample_with_pipeline, shares

PRECISIONS = ("fp16", "int8+fp16", "int8+fp8", "int4+fp16", "int4+fp8", "int2+fp16")
CAPTION_SEED = 4000  # the first captions of the 200 that the card's adherence is measured on


def pair_figures(video: np.ndarray, reference: np.ndarray, half: np.ndarray) -> tuple[float, float, float]:
    """PSNR (dB) and SSIM against the reference, PSNR (dB) against the fp16 video; means over the frames."""
    return float(psnr(video, reference).mean()), float(ssim(video, reference).mean()), float(psnr(video, half).mean())


def compare(judges: Judges, videos, references, halves) -> list[tuple[float, float, float]]:
    triples = list(zip(videos, references, halves))
    return judges.pool.starmap(pair_figures, triples, chunksize=2) if judges.pool else [pair_figures(*t) for t in triples]


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
        paired = [cell(row["psnr_db"], 1), cell(row["ssim"], 4), cell(row["psnr_to_fp16_db"], 1)] if "ssim" in row else [
            "reference", "reference", "-"]
        parts = [f"{100 * row['adherence'][p]:.0f} %" for p in ("colour", "shape", "motion", "background")]
        lines.append(f"| {name} | " + " | ".join(paired + parts) + " |")
    lines += ["", f"{record['captions']} held-out captions, {record['generation']['num_inference_steps']} DDIM steps, guidance "
              f"{record['generation']['guidance_scale']:g}, same noise; mean (95 % interval by bootstrap over captions); "
              f"backend {record['backend']} on {record['device']}."]
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("--out", default="outputs/precisions")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--captions", type=int, default=50)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    judges = Judges()  # forked before CUDA starts
    from lowbit_video.processors import LowBitAttnProcessor, coverage

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    generation = json.loads((Path(args.model) / "generation.json").read_text())
    generation["num_inference_steps"] = args.steps or generation["num_inference_steps"]
    captions = held_out_captions(args.captions, CAPTION_SEED)
    pipe = load_pipeline(args.model, args.device, torch.float32)
    shape = ((generation["num_frames"] - 1) // 4 + 1, pipe.transformer.config.in_channels, generation["height"] // 8,
             generation["width"] // 8)
    noise = noise_of(args.captions, shape, CAPTION_SEED)
    cuda = args.device.startswith("cuda")
    record = {"captions": args.captions, "generation": generation, "backend": args.backend, "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if cuda else "cpu", "rows": {}}

    def write() -> None:
        (out / "precisions.json").write_text(json.dumps(record, indent=1) + "\n")
        (out / "precisions.md").write_text(markdown(record))

    def run(name: str, references=None, halves=None):
        start = time.time()
        videos = sample_with_pipeline(pipe, captions, noise, generation, args.batch)
        seconds = time.time() - start
        verdicts = judges(videos, captions)
        row = {"adherence": shares(verdicts), "seconds": seconds}
        if references is not None:
            figures = np.array(compare(judges, videos, references, videos if halves is None else halves))
            row |= {"psnr_db": interval(figures[:, 0]), "ssim": interval(figures[:, 1]),
                    "psnr_to_fp16_db": interval(figures[:, 2])}
        record["rows"][name] = row
        contact_sheet(videos, captions, verdicts, out / f"{name.replace('+', '_').replace('/', '-')}.png", rows=8)
        print(f"{name}: {percent(row['adherence'])}  {json.dumps(row.get('psnr_db', {}))} {seconds:.1f} s", flush=True)
        write()
        return videos

    code = 0
    references = run("fp32")
    pipe = load_pipeline(args.model, args.device, torch.float16 if cuda else torch.float32)
    exact = dict(pipe.transformer.attn_processors)
    halves = None
    for name in args.precisions:
        try:
            if name == "fp16":
                pipe.transformer.set_attn_processor(dict(exact))
                halves = run(name, references)
                continue
            pipe.transformer.set_attn_processor(LowBitAttnProcessor(name, backend=args.backend))
            run(name, references, references if halves is None else halves)
            record["rows"][name]["coverage"] = str(coverage(pipe))[:2000]
        except Exception as error:
            traceback.print_exc()
            record["rows"][name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
            code = 1
        write()
    judges.close()
    print((out / "precisions.md").read_text(), flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
