"""`lowbit-video plan`: what a video costs on several GPUs, by every way to share it out, best first."""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..distributed.cost.figures import MEASURED, USUAL, Figures, load_figures
from ..distributed.cost.models import MODELS, find_model
from ..distributed.cost.split import MAX_GPUS, Cost, predict, splits, task_of
from ..distributed.cost.task import Task
from ..distributed.exchange import EXCHANGES, OUTPUTS
from ..files import write_json
from ..hook.recipe.recipe import Recipe
from ..precision import PRESETS

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of GPUs of the scaling."""
WHOLE = ("layer", "transformer", "step", "decode")
"""What is shown of the measured beside the modelled; the parts are only tested."""
SAME = ("model", "precision", "framework", "size", "link", "cuda_graph")
"""In what a measured thing is that which is planned."""
HEADER = ("GPUs", "cfg", "ulysses", "ring", "vae", "step ms", "speed-up", "efficiency", "MB sent", "GiB a GPU", "decode s",
          "video s", "")


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Registers `lowbit-video plan`."""
    parser = subparsers.add_parser(
        "plan", help="what a video costs on several GPUs, by every way to share it out",
        description="Time, bytes on the wire and memory of every way to share one video out, best first, from measured figures "
                    f"({MEASURED.name}; docs/parallel.md). Nothing runs.")
    parser.add_argument("--model", default="CogVideoX-2b", help=f"{', '.join(MODELS)}, or a folder (default: %(default)s)")
    parser.add_argument("--gpus", type=int, help=f"list all splits by so many, at most {MAX_GPUS} (default: the best by "
                        f"each of {', '.join(map(str, COUNTS))})")
    parser.add_argument("--link", default="nvlink", help="nvlink, pcie4, ib400: between the GPUs of a host; hosts of 8 "
                        "are linked by ib400 (default: %(default)s)")
    parser.add_argument("--precision", help=f"of attention (default: {Task.precision})")
    parser.add_argument("--recipe", metavar="FILE", help="precisions by layer and step in place of one, without pooled keys: a "
                        f"recipe's file, or {' or '.join(PRESETS)}; a step is then the mean of all (docs/recipes.md)")
    parser.add_argument("--exchange", default="auto", choices=EXCHANGES, help="what Q, K and V travel as (default: "
                        "the precision's codes)")
    parser.add_argument("--output", default="16bit", choices=OUTPUTS, help="what attention's output travels as "
                        "(default: %(default)s)")
    parser.add_argument("--framework", help="whose step was measured (default: the first in the figures)")
    parser.add_argument("--cuda-graph", action="store_true", help="the transformer as a CUDA graph, so that no host sets the "
                        "pace (PyTorch); compared with what was measured so")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    for name, unit in (("frames", "of the video"), ("height", "pixels"), ("width", "pixels")):
        parser.add_argument(f"--{name}", type=int, help=f"{unit} (default: the model's)")
    parser.add_argument("--no-text-encoder", action="store_true", help="the text encoder does not stay on the GPU")
    parser.add_argument("--measured", nargs="+", default=[], metavar="FILE", help="JSON like measured.json: its figures go "
                        "before the package's, and its rows are compared and plotted; or what `bench parallel` wrote")
    parser.add_argument("--json", metavar="FILE", help="write everything to a file")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the scaling; needs matplotlib")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; writes what was asked for."""
    if args.recipe is not None and args.precision is not None:
        raise ValueError(f"--precision {args.precision} and --recipe {args.recipe} are both given; give one of them")
    figures = load_figures(*args.measured)
    same = {name: getattr(args, name) for name in ("exchange", "output", "link", "framework", "cuda_graph",
                                                   "steps", "frames", "height", "width")}
    task = Task(find_model(args.model), figures, **same, text_encoder=not args.no_text_encoder,
                precision=Task.precision if args.precision is None else args.precision,
                recipe=None if args.recipe is None else Recipe.load(args.recipe))
    if task.cuda_graph and task.framework != "torch":
        raise ValueError(f"--cuda-graph records PyTorch's launches, and the framework is {task.framework}; add --framework "
                         "torch, or leave it out")
    if args.plot:
        from .plan_plot import check_plot, plot_scaling

        check_plot(args.plot)
    costs, refused = splits(task, args.gpus) if args.gpus is not None else ([], [])
    scaling = best_by_count(task) if args.plot or args.json or args.gpus is None else []
    alone = splits(task, 1)[0][0]
    print("\n".join([*heading(task), "", *table(costs or scaling, alone), ""]))
    for degrees, reason in refused:
        print(f"cannot be: {degrees}: {reason}")
    compared = compare(task, figures)
    print("\n".join(comparison(compared) + notes(task, args.gpus or MAX_GPUS, costs or scaling)))
    if args.json:
        write_json(args.json, {
            "about": {"model": task.model.name, "gpu": figures.gpu.name, "tokens": task.tokens, "size": list(task.size), **same,
                      "precision": task.precision, "layers": task.layers, "wire": travels(task), "framework": task.framework},
            "splits": [as_dict(cost, alone) for cost in costs],
            "refused": [{**asdict(degrees), "reason": reason} for degrees, reason in refused],
            "scaling": [as_dict(cost, alone) for cost in scaling], "measured": compared})
    if args.plot:
        plot_scaling(task, scaling, compared, args.plot)
    return 0


def best_by_count(task: Task) -> list[Cost]:
    """The best split by each of COUNTS, where there is one."""
    return [costs[0] for costs in (splits(task, gpus)[0] for gpus in COUNTS) if costs]


def speed_up(cost: Cost, alone: Cost) -> float:
    """How many times as fast a step is as on one GPU."""
    return alone.step_ms / cost.step_ms


def as_dict(cost: Cost, alone: Cost) -> dict[str, Any]:
    """A split as plain values."""
    return {**asdict(cost), "gpus": cost.degrees.ranks, "step_ms": cost.step_ms, "sent_bytes": cost.sent_bytes,
            "memory_gib": cost.memory_gib, "speed_up": speed_up(cost, alone),
            "efficiency": speed_up(cost, alone) / cost.degrees.ranks}


def heading(task: Task) -> list[str]:
    """What is planned."""
    frames, height, width = task.size
    layers = ""
    if task.recipe is not None:
        layers = f" ({', '.join(f'{name} in {count / task.model.layers:.0%}' for name, count in task.layers.items())})"
    return [f"{task.model.name}, {frames} frames of {height}x{width}: {task.tokens} tokens, {task.steps} steps with guidance; "
            f"{task.figures.gpu.name}, {task.link}",
            f"attention {task.precision}{layers}; Q, K and V travel as {travels(task)}, the output as {task.output}; the rest "
            f"as {task.framework} runs it" + ", as a CUDA graph" * task.cuda_graph]


def travels(task: Task) -> str:
    """What Q, K and V travel as, of each precision."""
    return " or ".join(dict.fromkeys(str(part.wire) for part in task.parts.values()))


def table(costs: Sequence[Cost], alone: Cost) -> list[str]:
    """One line a split."""
    rows = [HEADER]
    for cost in costs:
        d, times = cost.degrees, speed_up(cost, alone)
        rows.append((*map(str, (d.ranks, d.cfg, d.ulysses, d.ring, d.vae)), f"{cost.step_ms:.1f}", f"{times:.2f}",
                     f"{times / d.ranks:.0%}", f"{cost.sent_bytes / 1e6:.0f}", f"{cost.memory_gib:.1f}",
                     f"{cost.decode_ms / 1e3:.2f}", f"{cost.video_s:.1f}", "" if cost.fits else "does not fit"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def compare(task: Task, figures: Figures) -> list[dict[str, Any]]:
    """Whole things that were measured of this model at this precision, as a CUDA graph or not as the task is, with what the
    model of cost says of them."""
    found = []
    for row in figures.rows:
        if row.get("what") not in WHOLE:
            continue
        measured, degrees = task_of(row, figures)
        if all(getattr(measured, name) == getattr(task, name) for name in SAME):
            found.append({**row, "gpus": degrees.ranks, "split": str(degrees), "modelled_ms": predict(row, figures)})
    return found


def comparison(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each thing measured."""
    how = lambda row: "".join(f", {name} {row[name]}" for name, usual in USUAL.items()
                              if row.get(name, usual) != usual)
    return [f"measured: {row['what']} on {row['split']}{how(row)}: {row['ms']:.1f} ms, modelled {row['modelled_ms']:.1f} "
            f"({row['modelled_ms'] / row['ms'] - 1:+.1%})" for row in compared]


def notes(task: Task, gpus: int, costs: Sequence[Cost]) -> list[str]:
    """What must be known to read the table."""
    host = task.figures.gpu.host_ranks
    said = ["MB sent: by the busiest rank, a step. GiB: of the busiest GPU. Speed-up and efficiency: of a step, over one GPU."]
    if len(task.alike) > 1:
        said.append(f"Steps differ: step ms and MB sent are means of the {task.steps}.")
    if gpus > host and task.link != "ib400":
        said.append(f"Hosts have {host} GPUs: what crosses them goes over ib400, or {task.link} where that is slower.")
    if any(cost.step["host"] > 0 for cost in costs):
        said.append(f"The host launches a layer in {task.program.layer_host_us / 1e3:g} ms (layer_host_us, of a slow one), "
                    "however little the GPUs have to do: no step is shorter.")
    if any(not cost.fits for cost in costs):
        said.append(f"A GPU has {task.figures.gpu.memory_gib:.0f} GiB; what does not fit stands last.")
    return said
