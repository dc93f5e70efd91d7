"""Prompt adherence: does a video show what its caption asks for, in the small model's world?

`seeing.look` says what the frames show, without knowing the caption; here that is compared with the caption's meaning.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .captions import parse
from .scene import Meaning
from .seeing import Scene, look

PARTS = ("colour", "shape", "motion", "background")


@dataclass(frozen=True)
class Adherence:
    """Verdict per part; a part that the caption leaves open counts as met."""

    colour: bool
    shape: bool
    motion: bool
    background: bool
    scene: Scene
    meaning: Meaning

    @property
    def all(self) -> bool:
        return self.colour and self.shape and self.motion and self.background


def score(frames: np.ndarray, caption: str) -> Adherence:
    """Judge a video against its caption.

    Args:
        frames: uint8 `[F, H, W, 3]`, RGB, at least 5 frames of at least 32 x 32.
        caption: English, as `captions.parse` reads it.

    Raises:
        ValueError: frames of another shape or dtype.
    """
    scene, meaning = look(frames), parse(caption)
    asked = meaning.things
    # Pair what was asked with what was seen: the order that agrees in most colours, left to right where they tie.
    slots = list(scene.things[:3]) + [None] * max(0, len(asked) - len(scene.things))
    best = max(permutations(slots, len(asked)), key=lambda order: _agreement(asked, order))
    right_count = len(scene.things) == len(asked)

    def holds(part: str) -> bool:
        wanted = [(getattr(a, part), s) for a, s in zip(asked, best) if getattr(a, part) is not None]
        return all(s is not None and getattr(s, part) == w for w, s in wanted)

    background = (meaning.background in (None, scene.background)) and (
        meaning.background is None or meaning.texture in (None, scene.texture))
    return Adherence(holds("colour") and right_count, holds("shape"), holds("motion"), background, scene, meaning)


def _agreement(asked, order) -> tuple:
    def agrees(part):
        return sum(s is not None and getattr(a, part) == getattr(s, part) for a, s in zip(asked, order))

    return (agrees("colour"), agrees("shape"), agrees("motion"))
