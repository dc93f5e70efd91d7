"""One denoising step of Wan 2.1 1.3B at full size in diffusers by the attention backend, exact and ours, eager and compiled.

    python -m lowbit_video.eval.speed.experiments.wan_step --out FOLDER [--backends LIST] [--compile MODE] [--tiny]

A step is one forward pass: random weights in bfloat16, 32760 video tokens (81 frames of 480x832), 512 of text, head dim 128.
Every backend is checked against diffusers' own in eager mode first: finite, and as near as its precision allows; what is
compiled is one graph without a break (`fullgraph=True`), near what it is in eager mode. Then those that hold are timed in
turns, eager first. Writes wan_step.json after each mode: medians in ms, the 10th and 90th percentile, the speed-up over the
mode's fastest exact backend, what failed, and what the report says ran. --tiny is a dry run of a small model, also on a CPU.
"""
from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.utils import logging
from torch._dynamo.utils import counters

import lowbit_video
from lowbit_video.files import write_json
from lowbit_video.hook.dispatcher import registry

from .. import bench, timing

FA4 = "wan_step_flash_4"
EXACT = {"native": "PyTorch", "_native_cudnn": "cuDNN", FA4: "FlashAttention-4"}
OURS = {"lowbit_int8_fp8": "int8+fp8", "lowbit_int8_fp16": "int8+fp16"}
FLOOR_DB = {**dict.fromkeys(EXACT, 25.0), **dict.fromkeys(OURS, 15.0)}
"""Least accepted SQNR of a whole step; bfloat16 rounds hundreds of times on the way."""
TINY = dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=64, num_layers=1, in_channels=4, out_channels=4, text_dim=32,
            freq_dim=32)


def step(tiny: bool, device: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """(model, inputs) with random weights: Wan 2.1 1.3B, or a small one."""
    torch.manual_seed(0)
    config = TINY if tiny else dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, in_channels=16,
                                    out_channels=16, text_dim=4096, freq_dim=256)
    with torch.device(device):
        model = WanTransformer3DModel(**config, cross_attn_norm=True).eval()
        frames, height, width = (3, 16, 16) if tiny else (21, 60, 104)
        inputs = dict(hidden_states=torch.randn(1, config["in_channels"], frames, height, width),
                      timestep=torch.tensor([500]), encoder_hidden_states=torch.randn(1, 512, config["text_dim"]))
    dtype = torch.float32 if tiny else torch.bfloat16
    return model.to(dtype), {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def flash_4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """FlashAttention-4 of [B, S, H, D] tensors, one operator of a graph."""
    return _flash_4(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


@torch.library.custom_op("lowbit_video_experiments::flash_4", mutates_args=())
def _flash_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


@_flash_4.register_fake
def _(q, k, v, scale):
    return q.new_empty(q.shape)


def why_not(backend: str, device: str) -> str | None:
    """Why a backend is left out here, or None."""
    if backend in ("_native_cudnn", FA4) and device == "cpu":
        return "needs an NVIDIA GPU"
    if backend == FA4 and not (importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")):
        return "flash-attn-4 is not installed"
    return None


def sqnr_db(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal to noise in dB; infinite for equal tensors."""
    noise = (value.double() - wanted.double()).square().sum().item()
    return 10 * math.log10(wanted.double().square().sum().item() / noise) if noise else math.inf


class Case:
    """A backend in a mode: `run()` is one step."""

    def __init__(self, model: Any, forward: Callable, inputs: dict, backend: str, mode: str) -> None:
        self.backend, self.mode, self.name = backend, mode, f"{ {**EXACT, **OURS}[backend]}, {mode}"
        self._modules = [module.processor for module in model.modules() if hasattr(module, "processor")]
        self._forward, self._inputs = forward, inputs

    def run(self) -> torch.Tensor:
        """One step; the backend is set as `set_attention_backend` sets it, without its log."""
        name = attention_dispatch.AttentionBackendName(self.backend)
        for processor in self._modules:
            processor._attention_backend = name
        with torch.no_grad():
            return self._forward(**self._inputs, return_dict=False)[0]


def check(case: Case, wanted: torch.Tensor, eager: dict[str, torch.Tensor]) -> dict:
    """A row with what was checked; raises AssertionError where a case is wrong."""
    before = counters["stats"]["unique_graphs"]
    begin = time.perf_counter()
    out = case.run()
    row = dict(method={**EXACT, **OURS}[case.backend], backend=case.backend, mode=case.mode, sqnr_db=sqnr_db(out, wanted),
               first_call_s=round(time.perf_counter() - begin, 2), graphs=counters["stats"]["unique_graphs"] - before)
    assert torch.isfinite(out).all(), f"{case.name}: not finite"
    assert row["sqnr_db"] >= FLOOR_DB[case.backend], f"{case.name}: {row['sqnr_db']:.1f} dB"
    if case.mode == "eager":
        eager[case.backend] = out
    else:
        breaks = dict(counters["graph_break"])
        assert row["graphs"] == 1 and not breaks, f"{case.name}: {row['graphs']} graphs, broken by {breaks}"
        row["sqnr_to_eager_db"] = sqnr_db(out, eager[case.backend])
        assert row["sqnr_to_eager_db"] >= FLOOR_DB[case.backend], f"{case.name}: compiled {row['sqnr_to_eager_db']:.1f} dB"
    print(f"checked {case.name}: {row}", flush=True)
    return row


def times(cases: list[Case], device: str, budget_ms: float) -> list[timing.Timing]:
    """Of each case, taken in turns."""
    if device == "cuda":
        from lowbit_video.runtime import torch_runtime

        timer = timing.Timer(torch_runtime, torch.empty(1, device=device))
        return list(timing.time_together(timer, {case.name: case.run for case in cases}, budget_ms=budget_ms).values())
    samples: list[list[float]] = [[] for _ in cases]
    for _ in range(timing.LEAST_ROUNDS):
        for case, own in zip(cases, samples):
            begin = time.perf_counter()
            case.run()
            own.append((time.perf_counter() - begin) * 1e3)
    return [timing.summarise(own) for own in samples]


def main(arguments: list[str] | None = None) -> dict:
    """Checks, times, writes; returns what it wrote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for wan_step.json")
    parser.add_argument("--backends", default=f"native,_native_cudnn,{FA4},lowbit_int8_fp8",
                        help=f"by commas, of {', '.join([*EXACT, *OURS])}; the first is what the others are checked against")
    parser.add_argument("--compile", choices=("model", "blocks", "none"), default="model", help="what torch.compile takes")
    parser.add_argument("--budget-ms", type=float, default=6000.0, help="device time of the slowest case's runs")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU where there is no GPU")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.backends = args.backends.split(",")
    if unknown := set(args.backends) - {*EXACT, *OURS}:
        parser.error(f"no backend {', '.join(sorted(unknown))}; there are {', '.join([*EXACT, *OURS])}")
    if device == "cpu" and not args.tiny:
        parser.error("there is no GPU; --tiny is a dry run without one")
    args.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    model, inputs = step(args.tiny, device)
    lowbit_video.register_diffusers(model)
    registry.add(attention_dispatch, {FA4: flash_4})
    try:
        return measure(model, inputs, args, device)
    finally:
        registry.discard(attention_dispatch, [FA4])
        lowbit_video.unregister_diffusers()


def measure(model: Any, inputs: dict, args: argparse.Namespace, device: str) -> dict:
    """Mode by mode; returns what it wrote last."""
    tokens = math.prod(size // patch for size, patch in zip(inputs["hidden_states"].shape[2:], model.config.patch_size))
    about = dict(gpu=torch.cuda.get_device_name() if device == "cuda" else "none",
                 versions=bench.package_versions() | {"diffusers": diffusers.__version__}, commit=bench.commit(),
                 tiny=args.tiny, video_tokens=tokens, text_tokens=inputs["encoder_hidden_states"].shape[1],
                 head_dim=model.config.attention_head_dim)
    left_out = {backend: reason for backend in args.backends if (reason := why_not(backend, device))}
    backends = [backend for backend in args.backends if backend not in left_out]
    report = dict(about=about, left_out=left_out, failed={}, rows=[], ran={})
    eager: dict[str, torch.Tensor] = {}
    wanted = Case(model, model, inputs, backends[0], "eager").run()
    for mode in ("eager",) if args.compile == "none" else ("eager", f"compiled {args.compile}"):
        counters.clear()
        forward = model if mode == "eager" else compile_model(model, args.compile, "eager" if args.tiny else "inductor")
        cases, rows = [], []
        for case in (Case(model, forward, inputs, backend, mode) for backend in backends):
            try:
                rows.append(check(case, wanted, eager))
                cases.append(case)
            except Exception as error:  # noqa: BLE001 - the report says what failed
                report["failed"][case.name] = repr(error)[:600]
                print(f"failed {case.name}: {error!r}"[:2000], flush=True)
        for row, taken in zip(rows, times(cases, device, args.budget_ms) if cases else ()):
            row.update(median_ms=taken.median_ms, low_ms=taken.low_ms, high_ms=taken.high_ms, runs=taken.runs)
        best = min((row["median_ms"] for row in rows if row["backend"] in EXACT), default=math.nan)
        for row in rows:
            row["speedup_over_exact"] = best / row["median_ms"]
            print(f"{row['method']:<18}{mode:<16}{row['median_ms']:10.2f} ms  {row['speedup_over_exact']:.3f}x", flush=True)
        report["rows"] += rows
        report["ran"] = lowbit_video.coverage(model).variants()
        write_json(args.out / "wan_step.json", report)
    return report


def compile_model(model: Any, what: str, backend: str) -> Callable:
    """The model compiled whole, or its repeated blocks in place."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    if what == "model":
        return torch.compile(model, fullgraph=True, backend=backend)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


if __name__ == "__main__":
    sys.exit(bool(main()["failed"]))
