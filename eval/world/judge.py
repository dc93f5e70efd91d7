"""Prompt adherence: does a video show what its caption asks for, in the small model's world?

`look` of `seeing`, or of `scene_seeing` for the long world, says what the frames show, without knowing the caption; here that
is compared with the caption's meaning.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from . import scene_seeing, seeing
from .captions import parse
from .scene import SMALL, Meaning, World
from .seeing import Scene

PARTS = ("colour", "shape", "motion", "background")


@dataclass(frozen=True)
class Adherence:
    """Verdict per part; a part that the caption leaves open counts as met, and so does the camera of a world without one."""

    colour: bool
    shape: bool
    motion: bool
    background: bool
    scene: Scene
    meaning: Meaning
    camera: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """What is judged in the caption's world."""
        return PARTS if self.meaning.camera is None else (*PARTS, "camera")

    @property
    def all(self) -> bool:
        return all(getattr(self, part) for part in self.parts)


def score(frames: np.ndarray, caption: str, world: World = SMALL) -> Adherence:
    """Judge a video against its caption.

    Args:
        frames: uint8 `[F, H, W, 3]`, RGB, at least 5 frames of at least 32 x 32.
        caption: English, as `captions.parse` reads it.
        world: whose words and things they are.

    Raises:
        ValueError: frames of another shape or dtype.
    """
    scene, meaning = (seeing if world is SMALL else scene_seeing).look(frames), parse(caption, world)
    asked = meaning.things
    # Pair what was asked with what was seen: the order that agrees in most colours, left to right where they tie.
    slots = list(scene.things[: world.most_things + 1]) + [None] * max(0, len(asked) - len(scene.things))
    best = max(permutations(slots, len(asked)), key=lambda order: _agreement(asked, order))
    right_count = len(scene.things) == len(asked)

    def holds(part: str) -> bool:
        wanted = [(getattr(a, part), s) for a, s in zip(asked, best) if getattr(a, part) is not None]
        return all(s is not None and getattr(s, part) == w for w, s in wanted)

    background = (meaning.background in (None, scene.background)) and (
        meaning.background is None or meaning.texture in (None, scene.texture))
    return Adherence(holds("colour") and right_count, holds("shape"), holds("motion"), background, scene, meaning,
                     meaning.camera in (None, scene.camera))


def _agreement(asked, order) -> tuple:
    def agrees(part):
        return sum(s is not None and getattr(a, part) == getattr(s, part) for a, s in zip(asked, order))

    return (agrees("colour"), agrees("shape"), agrees("motion"))
