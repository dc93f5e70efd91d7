"""CLIPSIM: how well the frames fit the prompt, by the cosine of CLIP embeddings."""
from __future__ import annotations

from .shared import clip_model
from .shared.context import missing_model

NAME = "clipsim"
LABEL = "CLIPSIM"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = True
KIND = "alone"
PLACE = 60


def missing(weights) -> str | None:
    """Why it cannot run, or None."""
    return missing_model(weights, clip_model.WEIGHTS_KEY, clip_model.WHAT, clip_model.PACKAGES)


def measure(video, reference=None, context=None) -> float:
    """Mean over frames of cos(CLIP image, CLIP text).

    Source: Wu et al. 2021 (GODIVA), section 4; theirs is ours times 100 where a paper prints about 30.
    """
    return float((clip_model.image_features(video, context) @ clip_model.text_features(context.caption, context)).mean())
