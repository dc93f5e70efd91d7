"""An evaluation in parts: every so-manieth caption for each of several processes, and their folders as one folder again."""
from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lowbit_video.eval.compare.paired import differing
from lowbit_video.eval.compare.settings import Settings
from lowbit_video.eval.compare.store import RESULTS, Store

ABOUT = {"framework": None, "dtype": None, "backend": None, "reference": None, "compiled": False, "order": "raster",
         "cuda_graph": False}
"""What all videos of a folder share beside their settings: the names in its lines, and what is meant where one is not there."""


def part(text: str) -> tuple[int, int]:
    """(first, step) of "I/N", for captions[first::step]: the I-th of N parts."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: write I/N with I from 1 to N, such as 1/4")
    return int(number) - 1, int(of)


def otherwise(run: dict, about: dict) -> list[str]:
    """What of ABOUT a line of a folder says that `about` does not: "dtype float32" and the like."""
    known = {name: run.get(name, default) for name, default in ABOUT.items()}
    return [f"{name} {known[name]}" for name in ABOUT if known[name] != about[name]]


def join(folders: Sequence[Path], out: Path) -> None:
    """Put the results of several folders, and their clips, into a new one, captions in the order of one evaluation.

    Raises:
        FileNotFoundError: a folder has no results.
        ValueError: `out` has some; folders that were run otherwise, of other captions, or on another device; a video twice.
    """
    if (out / RESULTS).exists():
        raise ValueError(f"{out} has results; give another --out")
    stores = [Store(folder, write=False) for folder in folders]
    if empty := [store for store in stores if not store.runs()]:
        raise ValueError(f"{empty[0].folder} says of no video how it was made")
    first = stores[0].runs()[-1]
    settings, about = Settings(**first["settings"]), {name: first.get(name, default) for name, default in ABOUT.items()}
    captions, made = first["prompts"], {}
    for store in stores:
        run = store.runs()[-1]
        wrong = differing(run, settings) + otherwise(run, about)
        wrong += [name for name in ("prompts", "seeds") if run[name] != first[name]]
        if (device := run["environment"]["device"]) != first["environment"]["device"]:
            wrong.append(f"device {device}")
        if wrong:
            raise ValueError(f"{store.folder} was run otherwise than {stores[0].folder} ({'; '.join(wrong)})")
        for video in store.videos():
            if other := made.get(key := (video["prompt"], video["seed"], video["run"])):
                raise ValueError(f"{video['run']} of {video['prompt']!r} is in {other[0].folder} and in {store.folder}")
            made[key] = store, video
    runs = list(dict.fromkeys(name for store in stores for run in store.runs() for name in run["runs"]))
    place = lambda own: (captions.index(own[1]["prompt"]), runs.index(own[1]["run"]))
    joined = Store(out)
    try:
        for store in stores:
            for run in store.runs():
                joined.append(run)
        for store, video in sorted(made.values(), key=place):
            if clip := video.get("clip"):
                (out / clip).parent.mkdir(exist_ok=True)
                shutil.copyfile(store.folder / clip, out / clip)
            joined.append(video)
    finally:
        joined.close()
