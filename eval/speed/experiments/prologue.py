"""Checks the fused prologue against norms, positions and quantisation apart, and times both and each of their parts.

    python -m lowbit_video.eval.speed.experiments.prologue [--out FILE.json] [--framework paddle] [--cases NAME ...]
    TRITON_INTERPRET=1 python -m lowbit_video.eval.speed.experiments.prologue --tiny     # checks on a CPU

Codes and scales of some heads are compared one by one, and every row of them with float64; of two pieces all, to the bit
(`prologue_pieces`, which says whether these pay). Exits with 1 where a check fails.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowbit_video.engine import prologue
from lowbit_video.engine.checks import request_of
from lowbit_video.engine.gpu import Call
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.prologue_apart import write_behind_steps
from lowbit_video.engine.run import run
from lowbit_video.engine.select import select
from lowbit_video.engine.workspace import layout_workspace
from lowbit_video.hook.frames.rotary import rotated
from lowbit_video.kernels.formats import get_format, scale_block
from lowbit_video.kernels.prologue import quant as fused_quant
from lowbit_video.kernels.prologue import stats as fused_stats
from lowbit_video.kernels.prologue.steps import Norm, Rotary, Steps
from lowbit_video.kernels.quant import reference
from lowbit_video.runtime import detect

from ..inputs import fill_normal
from . import prologue_pieces

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
HALF_STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
"""Half of the step between neighbours of a dtype, over their magnitude."""
ROUNDINGS = 8
"""Half steps of the row's largest value that rounding may add up to."""
TIES = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 2e-3}
"""Of all codes, the share that may differ, by one: 16-bit steps that round otherwise."""
HOWS = ((1, 4), (1, 8), (1, 16), (2, 8), (3, 8), (6, 4), (6, 8), (6, 16), (10, 8))
"""Builds that are timed: heads of a program, its warps."""


class Case(NamedTuple):
    """batch, tokens, heads, head_dim; norm and rotary as `Steps` has them; projection: q, k and v are cut out of one."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    norm: str
    rotary: tuple[int, int] | None
    spec: str = "int8+fp8"
    projection: bool = False


CASES = {
    "2b": Case(2, 17776, 30, 64, "float16", "layer", None),
    "2b of one projection": Case(2, 17776, 30, 64, "float16", "layer", None, projection=True),
    "5b": Case(2, 17776, 48, 64, "bfloat16", "layer", (226, 17550)),
    "rms 128": Case(1, 32760, 24, 128, "bfloat16", "rms", (0, 32504)),
    "int4": Case(1, 17776, 30, 64, "float16", "layer", (226, 17550), "int4+fp8"),
}
TINY = {"layer": Case(1, 150, 2, 32, "float32", "layer", (10, 140)), "rms": Case(1, 140, 2, 32, "float32", "rms", None)}


class Made:
    """A case's tensors and the two calls on them: `plain` of q and k that had their steps before, `fused` of raw ones."""

    def __init__(self, case: Case, like: Any) -> None:
        self.case, self.runtime = case, detect.runtime_of(like)
        self.framework = sys.modules[self.runtime.NAME]
        width = case.heads * case.head_dim
        shape = [case.batch, case.tokens, case.heads, case.head_dim]
        if case.projection:
            whole = self.normal([case.batch, case.tokens, 3 * width], like, 1).reshape([*shape[:2], 3, *shape[2:]])
            self.q, self.k, self.v = (whole[:, :, part] for part in range(3))
        else:
            self.q, self.k, self.v = (self.normal([*shape[:2], width], like, seed, 0.5).reshape(shape) for seed in (1, 2, 3))
        rng = np.random.default_rng(4)
        tensor = lambda array, dtype: self.runtime.from_numpy(array.astype(np.float32), like, dtype)
        vector = lambda around: tensor(around + 0.2 * rng.standard_normal(case.head_dim), case.dtype)
        layer, table = case.norm == "layer", None
        norms = [Norm(case.norm, 1e-6, vector(1), vector(0.3) if layer else None, not layer) for _ in "qk"]
        if case.rotary:
            angles = np.repeat(rng.uniform(0, 6.28, (case.rotary[1], case.head_dim // 2)), 2, 1)
            table = Rotary(tensor(np.cos(angles), "float32"), tensor(np.sin(angles), "float32"), *case.rotary)
        self.steps = Steps(*norms, table)
        self.options = AttentionOptions(case.spec, return_lse=case.spec.startswith("int4"),
                                        backend="triton" if self.runtime.is_cpu(like) else "auto")
        reason = prologue.why_not(self.steps, self.q, self.k, self.v, self.options, None, self.runtime)
        assert reason is None, reason
        self.plain, self.fused = self.call(*self.ready(), self.v), self.call(self.q, self.k, self.v, steps=self.steps)

    def normal(self, shape: list[int], like: Any, seed: int, offset: float = 0.0) -> Any:
        x = self.runtime.empty(shape, self.case.dtype, like)
        with self.runtime.launch_guard(like):
            fill_normal(x, (1, 1, int(np.prod(shape[:2])), shape[2]), seed, offset)
        return x

    def call(self, *tensors: Any, **more: Any) -> Call:
        variant = select(request_of(*tensors, self.options, None, self.runtime), self.options.backend)
        return Call(variant, self.options.scaled(self.case.head_dim), *tensors, runtime=self.runtime, **more)

    def norms(self) -> tuple[Any, Any]:
        """q and k normed as the framework does."""
        layer_norm = self.framework.nn.functional.layer_norm
        found = []
        for x, norm in ((self.q, self.steps.q_norm), (self.k, self.steps.k_norm)):
            if norm.kind == "layer":
                found.append(layer_norm(x, [self.case.head_dim], norm.weight, norm.bias, norm.eps))
            else:
                squares = x.astype("float32") if self.runtime.NAME == "paddle" else x.float()
                found.append((x * (squares.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()).to(x.dtype) * norm.weight)
        return tuple(found)

    def turns(self, q: Any, k: Any) -> tuple[Any, Any]:
        """q and k with their positions, as frames have them."""
        table, concat = self.steps.rotary, self.runtime.concat
        if table is None:
            return q, k
        end = table.begin + table.tokens
        return tuple(concat([x[:, :table.begin], rotated(self.runtime, x[:, table.begin:end], (table.cos, table.sin)),
                             x[:, end:]], 1) for x in (q, k))

    def ready(self) -> tuple[Any, Any]:
        """q and k as attention takes them."""
        return self.turns(*self.norms())

    def guarded(self, method: Callable[[], Any]) -> Callable[[], Any]:
        def launched() -> None:
            with self.runtime.launch_guard(self.q):
                method()

        return launched

    def rows(self, call: Call, name: str, batch: int, head: int) -> np.ndarray:
        """A part of a call's workspace, of one head."""
        shape = (self.case.batch, self.case.heads, self.case.tokens, self.case.head_dim)
        offset, dtype, of = layout_workspace(shape, shape, call.options.precision, call.options.return_lse,
                                             fused=call is self.fused).parts[name]
        dtype = np.dtype(dtype.replace("float8_e4m3fn", "uint8"))
        count = int(np.prod(of[2:])) * dtype.itemsize
        offset += (batch * of[1] + head) * count
        return self.runtime.to_numpy(call.workspace[offset:offset + count]).view(dtype).reshape(of[2:])

    def one_head(self, x: Any, batch: int, head: int) -> np.ndarray:
        return self.runtime.to_numpy(x[batch, :, head]).astype(np.float64)


def check(made: Made) -> dict[str, Any]:
    """What both calls left for the first and the last head, compared."""
    case, precision = made.case, made.options.precision
    for call in (made.plain, made.fused):
        made.guarded(call.quantise)()
    ties, steps, scales, worst, v_wrong = 0.0, 0, 0.0, 0.0, 0
    heads = {(0, 0), (case.batch - 1, case.heads - 1)}
    for place in heads:
        for of, format, x in (("q", precision.q, made.q), ("k", precision.k, made.k)):
            codes = [made.rows(call, f"{of}_codes", *place) for call in (made.plain, made.fused)]
            scale = [made.rows(call, f"{of}_scale", *place) for call in (made.plain, made.fused)]
            off = np.abs(np.subtract(*(reference.decode(one, format) for one in codes))) / (1 if format == "int8" else 2)
            ties, steps = max(ties, float((off > 0).mean())), max(steps, int(off.max()))
            scales = max(scales, float(np.abs(scale[1] / scale[0] - 1).max()))
            block = scale_block(of, precision.granularity)
            wide = reference.expand_scale(scale[1][None, None], case.tokens, block)[0, 0][:, None]
            values = reference.decode(codes[1], format) * wide
            mean = f"{of}_mean"
            if getattr(precision, f"smooth_{of}"):
                values = values + made.rows(made.fused, mean, *place)
            ideal = ideal_rows(made, of, made.one_head(x, *place))
            bound = (0.5 if format == "int8" else 1.0) * wide + 1e-3 + (
                ROUNDINGS * HALF_STEP[case.dtype] * np.abs(ideal).max(-1, keepdims=True))
            worst = max(worst, float((np.abs(values - ideal) / bound).max()))
        if precision.pv == "fp8":
            v_wrong += int((made.rows(made.plain, "v_codes", *place) != made.rows(made.fused, "v_codes", *place)).sum())
    return dict(ties=ties, steps=steps, scale=scales, worst_row=worst, v_wrong=v_wrong,
                good=bool(ties <= TIES[case.dtype] and steps <= 1 and scales <= 4 * HALF_STEP[case.dtype] + 1e-5 and worst <= 1
                          and v_wrong == 0))


def ideal_rows(made: Made, of: str, x: np.ndarray) -> np.ndarray:
    """Rows [N, D] of one head, normed and turned in float64."""
    norm, table = getattr(made.steps, f"{of}_norm"), made.steps.rotary
    array = lambda tensor: made.runtime.to_numpy(tensor).astype(np.float64)
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps) * array(norm.weight)
    if norm.bias is not None:
        x = x + array(norm.bias)
    if table is not None:
        rows = slice(table.begin, table.begin + table.tokens)
        turned = (x[rows, ::2] + 1j * x[rows, 1::2]) * (array(table.cos) + 1j * array(table.sin))[:, ::2]
        x[rows, ::2], x[rows, 1::2] = turned.real, turned.imag
    return x


def times(made: Made, like: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds of the parts and of whole calls, in turns; of other builds; what their bytes would take by a copy."""
    from ..timing import Timer, time_together

    case, call, runtime = made.case, made.fused, made.runtime
    timer, normed = Timer(runtime, like), made.norms()
    part, means = call.parts.get, dict(q_mean=call.parts.get("q_mean"), k_mean=call.parts.get("k_mean"))
    statistics = lambda how=None: fused_stats.launch_prologue_stats(
        call.q, call.k, call.v, call.steps, part("partial"), **means, v_scale=part("v_scale"), how=how)
    codes = lambda how=None: fused_quant.launch_prologue_quant(
        call.q, call.k, call.q_codes, call.k_codes, call.steps, **means, lse_shift=part("lse_shift"), score_bias=part("bias"),
        sm_scale=call.options.scale, how=how)

    def apart() -> None:
        made.ready()
        made.plain.quantise()

    methods = {"copy of v": lambda: made.v.clone(), "norms": made.norms, "rotary": lambda: made.turns(*normed),
               "both by a kernel": lambda: write_behind_steps(made.q, made.k, made.steps, runtime),
               "quantise": made.plain.quantise, "apart": apart, "fused": call.quantise, "fused statistics": statistics,
               "fused codes": codes, "call apart": lambda: run(*made.ready(), made.v, made.options),
               "call fused": lambda: run(made.q, made.k, made.v, made.options, steps=made.steps)}
    found = time_together(timer, {name: made.guarded(method) for name, method in methods.items()}, budget_ms=1e3 * seconds)
    ms = {name: round(timing.median_ms, 4) for name, timing in found.items()}
    host = {name: round(found[name].host_us, 1) for name in ("call apart", "call fused")}
    builds: dict[str, Any] = {}
    for name, launch in (("statistics", statistics), ("codes", codes)):
        tried = {}
        for how in HOWS:
            method = made.guarded(lambda launch=launch, how=how: launch(how))
            try:
                method()
                tried[str(how)] = method
            except Exception as error:  # noqa: BLE001 - one build may not fit
                builds[f"{name} {how}"] = repr(error)[:200]
        timed = time_together(timer, tried, budget_ms=200 * seconds)
        builds[name] = {how: round(timing.median_ms, 4) for how, timing in timed.items()}
    size = case.batch * case.tokens * case.heads * case.head_dim
    precision = call.options.precision
    once = size * (3 * BYTES[case.dtype] + sum(get_format(name).bits / 8 for name in (precision.q, precision.k, precision.pv)))
    again = once + size * BYTES[case.dtype] * 2  # K and V are read twice
    rate = 2 * size * BYTES[case.dtype] / ms["copy of v"]
    return dict(ms=ms, host_us=host, builds=builds, copy_tb_s=round(rate / 1e9, 3), bytes_once_ms=round(once / rate, 4),
                bytes_read_ms=round(again / rate, 4), fused_to_bytes_once=round(ms["fused"] * rate / once, 3),
                apart_to_fused=round(ms["apart"] / ms["fused"], 2))


def in_pieces(made: Made, like: Any, seconds: float) -> dict[str, Any]:
    """The check of two pieces, and with any seconds their times."""
    from ..timing import Timer

    pieces = prologue_pieces.Pieces(made)
    found = dict(check=prologue_pieces.check(pieces))
    return found | (prologue_pieces.times(pieces, Timer(made.runtime, like), seconds) if seconds else {})


def step(name: str, like: Any, seconds: float, tiny: bool = False) -> dict[str, Any]:
    """A whole step of a diffusers model with random weights, by processors that fuse, in two pieces too, and that do not."""
    import torch

    from lowbit_video import LowBitAttnProcessor, apply, coverage, remove
    from lowbit_video.hook import prologue as switches
    from lowbit_video.hook.base import set_processor
    from lowbit_video.hook.report import attention_modules

    from ..accuracy import sqnr_db
    from ..step.models import MODELS
    from ..timing import Timer, time_together

    model, given = MODELS[name].make(str(like.device), torch.float32 if tiny else torch.bfloat16, tiny)
    ways = {way: LowBitAttnProcessor("int8+fp8", fused_prologue=way != "apart") for way in ("apart", "fused", "pieces")}

    def run_by(way: str) -> Any:
        for module in attention_modules(model).values():
            set_processor(module, ways[way])
        before, switches.TWO_PIECES = switches.TWO_PIECES, way == "pieces"
        try:
            with torch.no_grad():
                return model(**given, return_dict=False)[0]
        finally:
            switches.TWO_PIECES = before

    apply(model, ways["apart"])
    outs, ran = {}, {}
    for way in ways:
        outs[way] = run_by(way).double().cpu().numpy()
        ran[way] = coverage(model).variants()
    timed = time_together(Timer(detect.runtime_of(like), like), {way: lambda way=way: run_by(way) for way in ways},
                          budget_ms=1e3 * seconds)
    remove(model)
    modules = len(attention_modules(model))
    good = all(bool(np.isfinite(outs[way]).all()) and [word in name for name in ran[way]] == [True]
               for way, word in (("fused", "fused prologue)"), ("pieces", "fused prologue of two pieces)")))
    return dict(ms={way: round(timing.median_ms, 3) for way, timing in timed.items()}, modules=modules, ran=ran,
                sqnr_db={way: round(float(sqnr_db(outs[way], outs["apart"])), 1) for way in ("fused", "pieces")},
                check=dict(good=good))


def main() -> int:
    """Checks, times, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--framework", default="torch", choices=("torch", "paddle"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, checks only: for a CPU and Triton's interpreter")
    parser.add_argument("--pieces", action="store_true", help="time two pieces alone beside one, and a step")
    parser.add_argument("--seconds", type=float, default=1.0, help="of the GPU for a case's calls")
    parser.add_argument("--most", type=float, default=80.0, help="seconds after which no case begins")
    parser.add_argument("--step", metavar="MODEL", default="cogvideox-2b",
                        help="also a step of this model of `bench step`, on PyTorch; none: none (default: cogvideox-2b)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    like = detect.anchor(args.framework, "cpu" if args.tiny else "auto")
    from ..bench import environment

    report: dict[str, Any] = dict(command=" ".join(sys.argv), about={} if args.tiny else environment(args.framework), cases={})
    begin, table = time.perf_counter(), TINY if args.tiny else CASES

    def tell(name: str, found: dict[str, Any]) -> None:
        report["cases"].setdefault(name, {}).update(found)
        print(json.dumps({name: found}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")

    for name in args.cases or table:
        if time.perf_counter() - begin > args.most:
            tell(name, dict(left_out=f"{args.most:.0f} s were over"))
            continue
        try:
            made = Made(table[name], like)
            tell(name, dict(case=table[name]._asdict(), check=check(made)))
            if not args.tiny and not args.pieces:
                tell(name, times(made, like, args.seconds))
            if made.options.precision.pv == "fp8":
                tell(f"{name}, two pieces", in_pieces(made, like, 0 if args.tiny else args.seconds))
        except Exception as error:  # noqa: BLE001 - the others are still wanted
            tell(name, dict(failed=repr(error)[:600], where=traceback.format_exc()[-1500:]))
        made = None
    if args.step != "none" and args.framework == "torch" and not args.tiny:
        try:
            tell(f"step {args.step}", step(args.step, like, 3 * args.seconds))
        except Exception as error:  # noqa: BLE001 - what was measured is still wanted
            tell(f"step {args.step}", dict(failed=repr(error)[:600], where=traceback.format_exc()[-1500:]))
    return summary(report, time.perf_counter() - begin)


def summary(report: dict[str, Any], seconds: float) -> int:
    """Prints a line a case; 1 where one is not good."""
    bad = [name for name, found in report["cases"].items() if not found.get("check", {}).get("good") or "failed" in found]
    titles = ("apart", "fused", "stats", "codes", "of bytes", "call apart", "call fused")
    print(f"{'ms':<22}" + "".join(title.rjust(12) for title in titles))
    for name, found in report["cases"].items():
        ms = found.get("ms")
        if ms and "codes of two" in ms:
            print(f"{name:<22} up to codes {ms['codes of one']:.3f} of one piece, {ms['codes of two']:.3f} of two")
        elif ms and "call apart" not in ms:
            print(f"{name:<22}{ms['apart']:12.3f}{ms['fused']:12.3f}{ms['pieces']:12.3f} of two pieces  a whole step, "
                  f"{found['sqnr_db']} dB")
        elif ms:
            print(f"{name:<22}{ms['apart']:12.3f}{ms['fused']:12.3f}{ms['fused statistics']:12.3f}{ms['fused codes']:12.3f}"
                  f"{found['fused_to_bytes_once']:11.2f}x{ms['call apart']:12.3f}{ms['call fused']:12.3f}")
    print(f"{len(report['cases'])} cases, not good: {', '.join(bad) or 'none'}, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
