"""Prompt adherence in a small model's world: are colour, shape, motion, background and camera those of the caption?"""
from __future__ import annotations

from ..video import as_uint8

NAME = "adherence"
LABEL = "adherence"
UNIT = ""
DIGITS = 2
HIGHER_IS_BETTER = True
KIND = "alone"
PLACE = 50


def measure(video, reference=None, context=None) -> dict[str, float] | None:
    """1 or 0 for each part, and for all of them together.

    None for a caption that does not state every part in the world's own terms (the scorer would call an open part met),
    and for clips shorter or smaller than the scorer can judge.

    Raises:
        BadVideoError: see `video.as_uint8`.
    """
    from .. import world
    from ..world import judge

    frames = as_uint8(video)
    of = world.WORLDS[context.world]
    if not world.parse(context.caption, of).complete:
        return None
    try:
        verdict = judge.score(frames, context.caption, of)
    except ValueError:
        return None
    return {**{part: float(getattr(verdict, part)) for part in verdict.parts}, "all": float(verdict.all)}
