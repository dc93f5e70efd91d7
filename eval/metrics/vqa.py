"""VQAScore: the probability that a vision-language model answers yes when asked whether the frames show the prompt."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from ..video import as_uint8
from .shared.context import missing_model
from .shared.flow import spread

NAME = "vqa"
LABEL = "VQAScore"
UNIT = ""
DIGITS = 3
HIGHER_IS_BETTER = True
KIND = "alone"
PLACE = 70
WEIGHTS_KEY = "vqa"
WHAT = "the cache folder of t2v_metrics that holds clip-flant5-xxl (or another of its models: vqa=FOLDER:MODEL)"
DEFAULT_MODEL = "clip-flant5-xxl"
FRAMES = 8  # frames asked about, evenly spread


def folder_and_model(named: str) -> tuple[str, str]:
    """Split FOLDER[:MODEL]."""
    folder, _, model = named.partition(":")
    return folder, model or DEFAULT_MODEL


def missing(weights) -> str | None:
    """Why it cannot run, or None."""
    named = {WEIGHTS_KEY: folder_and_model(weights[WEIGHTS_KEY])[0]} if WEIGHTS_KEY in weights else {}
    return missing_model(named, WEIGHTS_KEY, WHAT, ("torch", "t2v_metrics"))


def load(context):
    """The scorer, from the folder that the user named; the hub is kept offline so that nothing is downloaded."""
    if NAME not in context.models:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import t2v_metrics
        import torch

        folder, model = folder_and_model(context.weights[WEIGHTS_KEY])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        context.models[NAME] = t2v_metrics.VQAScore(model=model, device=device, cache_dir=folder)
    return context.models[NAME]


def measure(video, reference=None, context=None) -> float:
    """Mean VQAScore of at most eight frames, evenly spread.

    Source: Lin et al. 2024 (VQAScore), through the authors' package t2v_metrics.
    """
    import imageio.v3 as iio

    scorer = load(context)
    frames = as_uint8(video)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i in spread(len(frames), FRAMES):
            paths.append(str(Path(folder) / f"{i:04d}.png"))
            iio.imwrite(paths[-1], frames[i])
        return float(np.mean([scorer(images=[path], texts=[context.caption]).item() for path in paths]))
