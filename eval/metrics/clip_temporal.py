"""CLIP-temporal: how alike neighbouring frames are to CLIP, whatever the prompt says."""
from __future__ import annotations

from ..video import BadVideoError
from .shared import clip_model
from .shared.context import missing_model

NAME = "clip_temporal"
LABEL = "CLIP-temporal"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = True
KIND = "alone"
PLACE = 90
PERFECT = 1.0


def missing(weights) -> str | None:
    """Why it cannot run, or None."""
    return missing_model(weights, clip_model.WEIGHTS_KEY, clip_model.WHAT, clip_model.PACKAGES)


def measure(video, reference=None, context=None) -> float:
    """Mean cosine of the CLIP embeddings of neighbouring frames.

    Raises:
        BadVideoError: fewer than two frames.

    Source: "frame consistency" of Esser et al. 2023 (Gen-1) and EvalCrafter's CLIP-Temp.
    """
    features = clip_model.image_features(video, context)
    if len(features) < 2:
        raise BadVideoError(f"clip_temporal needs at least 2 frames, the video has {len(features)}")
    return float((features[1:] * features[:-1]).sum(axis=1).mean())
