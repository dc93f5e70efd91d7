"""Times one step of a model of ppdiffusers 0.29.0 at full size, random weights, by each attention, in turns on one GPU.

    python -m lowbit_video.eval.speed.experiments.ppdiffusers_step --out FILE.json [--models pixart-1024 ...] [--tiny]

A step is one forward of Transformer2DModel, both samples of guidance in one batch, on the place that Paddle has. Every method's
prediction is compared with that of this project's exact attention first; one that cannot run, as for want of memory, is left
out with its reason. FILE.md beside FILE.json is the table. --tiny: two layers and short images, also on a CPU.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lowbit_video
from lowbit_video.eval.speed import accuracy, bench, timing
from lowbit_video.eval.speed.random_weights import fan_in, random_paddle
from lowbit_video.files import write_json, write_whole
from lowbit_video.hook.report import attention_modules
from lowbit_video.runtime import detect

_XL = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, patch_size=2,
           attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_elementwise_affine=False)
_PIXART = _XL | dict(norm_type="ada_norm_single", norm_eps=1e-6, cross_attention_dim=1152)
MODELS = {"pixart-1024": _PIXART | dict(sample_size=128), "pixart-2048": _PIXART | dict(sample_size=256),
          "dit-2048": _XL | dict(norm_type="ada_norm_zero", sample_size=256)}
"""Configurations of Transformer2DModel by name and pixels: 4096, 16384 and 16384 tokens. Source: the files config.json of
PixArt-alpha/PixArt-XL-2-1024-MS and facebook/DiT-XL-2-512. Text comes as wide as the model is: 0.29.0 cannot build the
projection before it (`caption_channels`), two small matrices."""
TINY = dict(num_attention_heads=2, num_layers=2, sample_size=16)
BATCH, TEXT_TOKENS = 2, 300
GAIN, QK_GAIN, GATE_SPREAD = 1.0, 1.2, 0.5
"""Standard deviation of weights times the root of their inputs; of Q's and K's, so that softmax has peaks; of what modulates a
block, so that it lets attention through. Without these attention would hardly matter to the result: no check would see it."""

REFERENCE, NONE, UNTOUCHED = "exact", "none", "untouched"
PLAIN = "AttnProcessor"
METHODS = {
    UNTOUCHED: "ppdiffusers' own",
    REFERENCE: "exact, this project's kernel",
    "int8+fp8": "int8+fp8, text as `fallback` has it",
    "int8+fp16": "int8+fp16, text as `fallback` has it",
    "int8+fp8 and exact": "int8+fp8, text by the exact kernel",
    NONE: "no attention",
}
FLOOR_DB = {UNTOUCHED: 20.0, REFERENCE: math.inf, NONE: -math.inf}
LOW_BIT_FLOOR_DB = 10.0
"""Least SQNR of a step beside the exact one: 16-bit types round hundreds of times on the way. Without attention it is less."""
ROUNDS, LEAST_ROUNDS = 7, 3
HOST_US = 5e3
"""What a step is taken to cost the host before the device has work: so much the device is kept busy before a step is timed."""

Put = Callable[[], contextlib.AbstractContextManager]


def methods_of(model: Any) -> dict[str, Put]:
    """What puts each method's attention into a model, and takes it out again."""
    text = {"*.attn2": "exact"} if any(name.endswith(".attn2") for name in attention_modules(model)) else None
    return {
        UNTOUCHED: contextlib.nullcontext,
        REFERENCE: lambda: lowbit_video.apply(model, "exact"),
        "int8+fp8": lambda: lowbit_video.apply(model, "int8+fp8", fallback="exact"),
        "int8+fp16": lambda: lowbit_video.apply(model, "int8+fp16", fallback="exact"),
        **({"int8+fp8 and exact": lambda: lowbit_video.apply(model, "int8+fp8", text)} if text else {}),
        NONE: lambda: _without(model),
    }


@contextlib.contextmanager
def _without(model: Any) -> Iterator[None]:
    """Inside, attention is nothing but its projections; Q goes out."""
    def processor(attn, hidden_states, encoder_hidden_states=None, **_):
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attn.to_k(keys), attn.to_v(keys)
        return attn.to_out[0](attn.to_q(hidden_states))

    before = {attn: attn.processor for attn in attention_modules(model).values()}
    try:
        for attn in before:
            attn.processor = processor
        yield
    finally:
        for attn, own in before.items():
            attn.processor = own


def measure(step: Callable[[], Any], methods: Mapping[str, Put], once: Callable[[Callable], float], report: Callable[[], Any],
            say: Callable[[str], None], rounds: int = ROUNDS, budget_s: float = math.inf) -> list[dict[str, Any]]:
    """A row for each method, checked, then timed in turns.

    step() gives a prediction; once(step): its ms; report(): the coverage of what ran. A method that fails has a row that says
    why (`left_out`) and no time. budget_s: after so many seconds of turns no other begins; LEAST_ROUNDS are made.
    """
    rows: dict[str, dict[str, Any]] = {name: dict(method=name) for name in methods}
    wanted = None
    for name in sorted(methods, key=lambda name: name != REFERENCE):
        row, begin = rows[name], time.perf_counter()
        with _left_out_if_it_fails(row, say), methods[name]():
            out = step()
            out = detect.runtime_of(out).to_numpy(out)
            row["first_call_s"] = round(time.perf_counter() - begin, 2)
            wanted = out if name == REFERENCE else wanted
            row["sqnr_db"] = _checked(name, out, wanted)
            if name not in (UNTOUCHED, NONE):
                row["summary"], row["ran"] = report().summary(), report().variants()
            say(f"{name}: {row['sqnr_db']:.1f} dB, first call {row['first_call_s']} s; {row.get('summary', '')}")
    times: dict[str, list[float]] = {name: [] for name in methods}
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() - begin > budget_s:
            break
        for name in [name for name in methods if "left_out" not in rows[name]][::-1 if turn % 2 else 1]:
            with _left_out_if_it_fails(rows[name], say), methods[name]():
                if not times[name] or times[name][-1] < timing.SETTLES_MS:
                    step()  # what ran before leaves a short step slower or faster
                times[name].append(once(step))
    _fill_in(rows, {name: samples for name, samples in times.items() if samples and "left_out" not in rows[name]})
    return list(rows.values())


@contextlib.contextmanager
def _left_out_if_it_fails(row: dict[str, Any], say: Callable[[str], None]) -> Iterator[None]:
    """An error inside is noted in the row, so that one method's failure does not lose the others."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        row["left_out"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        say(f"{row['method']}: left out, {row['left_out']}")


def _checked(name: str, out: np.ndarray, wanted: np.ndarray | None) -> float:
    """SQNR beside the reference; AssertionError where it is too small or, without attention, where the check sees none."""
    assert np.isfinite(out).all(), "the prediction is not finite"
    assert wanted is not None, f"there is no prediction by {REFERENCE} attention to compare with"
    sqnr_db = accuracy.sqnr_db(out.astype(np.float64), wanted.astype(np.float64))
    floor = FLOOR_DB.get(name, LOW_BIT_FLOOR_DB)
    assert sqnr_db >= floor, f"{sqnr_db:.1f} dB beside exact attention, wanted {floor}"
    assert name != NONE or sqnr_db < LOW_BIT_FLOOR_DB, f"{sqnr_db:.1f} dB without attention: the check would miss a wrong one"
    return sqnr_db


def _fill_in(rows: dict[str, dict[str, Any]], times: dict[str, list[float]]) -> None:
    """Medians, percentiles, speed over exact attention, and attention's share: what a step takes beyond one without it."""
    for name, samples in times.items():
        taken = timing.summarise(samples)
        rows[name].update(ms=taken.median_ms, low_ms=taken.low_ms, high_ms=taken.high_ms, runs=taken.runs)
    exact, without = (rows.get(name, {}).get("ms") for name in (REFERENCE, NONE))
    for name in times:
        rows[name]["over_exact"] = exact / rows[name]["ms"] if exact else None
        rows[name]["attention_share"] = 1 - without / rows[name]["ms"] if without else None


def clock(like: Any) -> Callable[[Callable], float]:
    """ms of a call: of the device, by events, from a cold L2 cache; of the host where `like` is on a CPU."""
    runtime = detect.runtime_of(like)
    if not runtime.is_cpu(like):
        timer = timing.Timer(runtime, like)
        return lambda call: timer.sample(call, 1, HOST_US)[0]

    def once(call: Callable) -> float:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3

    return once


def step_of(config: Mapping[str, Any], dtype: str) -> tuple[Any, Callable[[], Any]]:
    """(A random Transformer2DModel of a configuration on Paddle's current device, one step of it)."""
    import paddle
    import ppdiffusers

    model = random_paddle(lambda: ppdiffusers.Transformer2DModel(**config), dtype, _spread)
    rng, like = np.random.default_rng(0), next(iter(model.parameters()))
    normal = lambda *shape: detect.runtime_of(like).from_numpy(rng.standard_normal(shape).astype(np.float32), like, dtype)
    size = config["sample_size"]
    given = dict(hidden_states=normal(BATCH, config["in_channels"], size, size), timestep=paddle.to_tensor([500] * BATCH))
    if config["norm_type"] == "ada_norm_single":
        given["encoder_hidden_states"] = normal(BATCH, TEXT_TOKENS, config["cross_attention_dim"])
        given["added_cond_kwargs"] = dict(resolution=paddle.full([BATCH, 2], 8 * size, dtype),
                                          aspect_ratio=paddle.full([BATCH, 1], 1, dtype))
    else:
        given["class_labels"] = paddle.to_tensor([207] * BATCH)

    def step() -> Any:
        with paddle.no_grad():
            return model(**given, return_dict=False)[0]

    return model, step


def _spread(name: str, shape: list[int]) -> float:
    """Standard deviation of a parameter; 0 of those that stay one or zero, as they were made."""
    if name.endswith(".linear.bias"):  # AdaLayerNorm's, after which a block's gates are
        return GATE_SPREAD
    if len(shape) < 2:
        return 0.0
    return (QK_GAIN if ".to_q." in name or ".to_k." in name else GAIN) / math.sqrt(fan_in(shape))


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each model."""
    about = result["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [f"# One step of ppdiffusers' models on {about['gpu'] or 'a CPU'}", "",
             f"{versions}; commit {about['commit']}.", f"`{about['command']}`", "",
             "Random weights. Medians in ms, all methods of a model in turns, each from a cold L2 cache, quantisation counted. "
             "Attention: its share of the step, by a step without any. SQNR: beside the exact step."]
    for model in result["models"]:
        lines += ["", f"## {model['model']}: {model['tokens']} tokens, batch {model['batch']}, {model['dtype']}", "",
                  "| attention | ms | over exact | attention | SQNR dB |", "|" + " --- |" * 5]
        for row in model["rows"]:
            title = METHODS.get(row["method"], row["method"])
            if "left_out" in row:
                lines.append(f"| {title} | left out: {row['left_out'].replace('|', '/')} | | | |")
                continue
            share, none = row["attention_share"], row["method"] == NONE
            lines.append(f"| {title} | {row['ms']:.1f} | {'' if none else format(row['over_exact'], '.2f') + 'x'} | "
                         f"{'' if none or share is None else format(share, '.0%')} | "
                         f"{'itself' if row['sqnr_db'] == math.inf else format(row['sqnr_db'], '.1f')} |")
        lines.append("")
        if model["own_processor"] == PLAIN:
            lines.append(f"{METHODS[UNTOUCHED]}: {PLAIN}, which writes all products of Q and K to memory; where Paddle has "
                         "fused attention, ppdiffusers takes another.")
        lines += [f"{row['method']}: {row['summary']}." for row in model["rows"] if "summary" in row]
    return "\n".join(lines) + "\n"


def _measured(name: str, config: Mapping[str, Any], dtype: str, device: str, budget_s: float) -> dict[str, Any]:
    """What is written of one model."""
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    print(f"{name}: {tokens} tokens", flush=True)
    model, step = step_of(config, dtype)
    rows = measure(step, methods_of(model), clock(detect.anchor("paddle", device)), lambda: lowbit_video.coverage(model),
                   lambda text: print(f"  {text}", flush=True), budget_s=budget_s)
    own = type(next(iter(attention_modules(model).values())).processor).__name__
    return dict(model=name, tokens=tokens, batch=BATCH, dtype=dtype, layers=config["num_layers"], own_processor=own, rows=rows)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, writes after each model; 1 where one of this project's methods could not be timed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["pixart-1024", "pixart-2048"])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="on a GPU; float32 on a CPU")
    parser.add_argument("--budget-s", type=float, default=30.0, help="seconds of turns a model, three turns at least")
    parser.add_argument("--tiny", action="store_true", help="two layers and images of 128 pixels")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    import paddle

    from lowbit_video.runtime import paddle_runtime

    device = paddle_runtime.default_device()
    if device == "cpu" and not args.tiny:
        parser.error("this needs an NVIDIA GPU, and Paddle has none here; --tiny is a dry run without one")
    paddle.set_device(device)
    import ppdiffusers

    about = bench.environment("paddle")
    about["versions"]["ppdiffusers"] = ppdiffusers.__version__
    words = " ".join(args.out.name if word == str(args.out) else word for word in (sys.argv[1:] if argv is None else argv))
    about["command"] = f"python -m lowbit_video.eval.speed.experiments.ppdiffusers_step {words}"
    result: dict[str, Any] = dict(about=about, tiny=args.tiny, models=[])
    for name in args.models:
        config = MODELS[name] | (TINY if args.tiny else {})
        if "cross_attention_dim" in config:
            config["cross_attention_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
        result["models"].append(_measured(name, config, "float32" if device == "cpu" else args.dtype, device, args.budget_s))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
        with write_whole(args.out.with_suffix(".md")) as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return int(any("left_out" in row for model in result["models"] for row in model["rows"] if row["method"] != UNTOUCHED))


if __name__ == "__main__":
    sys.exit(main())
