"""Times the attention of a whole denoising by a recipe, beside one precision everywhere and exact attention.

    python -m lowbit_video.eval.speed.experiments.recipe_attention --model DIR --tokens 10048 safe mine.toml

Each distinct choice of a layer in a step is timed once on random tensors of the model's heads, as its processor calls it, with
the cuts and copies that heads of several rungs need; the sum counts it as often as the recipe does. What is timed is
attention alone with its quantisation and choice: no norms, no positions.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit_video.files import write_json
from lowbit_video.hook.attend import exact_attend
from lowbit_video.hook.processors import LowBitAttnProcessor
from lowbit_video.hook.recipe.clock import StepClock
from lowbit_video.hook.recipe.processor import RecipeAttnProcessor
from lowbit_video.hook.recipe.recipe import Recipe
from lowbit_video.hook.recipe.table import LayerPlan, Span, table_of
from lowbit_video.precision import names_recipe
from lowbit_video.runtime import detect

from ..inputs import make_inputs

DENSE = "int8+fp8"


def choices_of(recipe: Recipe, layers: int, heads: int) -> dict[tuple[str, ...], float]:
    """How much of a denoising's attention each choice is: rungs by head, and its part of all layers and steps."""
    names = [f"transformer_blocks.{layer}.attn1" for layer in range(layers)]
    found: Counter[tuple[str, ...]] = Counter()
    for plan in table_of(recipe.rules, dict.fromkeys(names, heads), recipe.source).layers.values():
        for span in plan.spans:
            found[span.rungs] += (span.end - span.start) / layers
    return dict(found)


def call_of(rungs: tuple[str, ...], q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """A layer's attention in a step, as a recipe's processor computes it."""
    processor = RecipeAttnProcessor(LayerPlan((Span(0.0, 1.0, rungs),)), StepClock())
    return lambda: processor.attend(q, k, v)


def main() -> int:
    """Times, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help="files, presets or precisions")
    parser.add_argument("--model", type=Path, required=True, help="folder of a CogVideoX model, of which only sizes are read")
    parser.add_argument("--tokens", type=int, required=True, help="of text and video together")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    parser.add_argument("--framework", default="torch", choices=("torch", "paddle"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from ..bench import environment
    from ..timing import Timer, time_together

    config = json.loads((args.model / "transformer" / "config.json").read_text())
    layers, heads, head_dim = (config[name] for name in ("num_layers", "num_attention_heads", "attention_head_dim"))
    like = detect.anchor(args.framework, "auto")
    runtime = detect.runtime_of(like)
    shape = (args.batch, args.tokens, heads, head_dim)
    q, k, v = make_inputs(runtime, shape, args.dtype, like)
    asked = {}
    for name in args.recipes:
        recipe = Recipe.load(name) if names_recipe(name) else Recipe([{"rung": name}], source=name)
        asked[name] = choices_of(recipe, layers, heads)
    processor = LowBitAttnProcessor(DENSE)
    calls: dict[Any, Callable[[], Any]] = {DENSE: lambda: processor.attend(q, k, v), "exact": lambda: exact_attend(q, k, v),
                                           "framework's exact": lambda: runtime.exact_attention(q, k, v)}
    calls |= {rungs: call_of(rungs, q, k, v) for choices in asked.values() for rungs in choices}
    times = {name: timing.median_ms for name, timing in time_together(Timer(runtime, like), calls, budget_ms=60.0).items()}
    report: dict[str, Any] = dict(command=" ".join(sys.argv), about=environment(args.framework), shape=shape, dtype=args.dtype,
                                  ms={name: round(times[name], 4) for name in calls if isinstance(name, str)}, recipes={})
    for name, choices in asked.items():
        ms = sum(share * times[rungs] for rungs, share in choices.items())
        report["recipes"][name] = dict(ms=round(ms, 4), faster=round(times[DENSE] / ms, 3), choices=len(choices))
    print(json.dumps(report, indent=1), flush=True)
    if args.out:
        write_json(args.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
