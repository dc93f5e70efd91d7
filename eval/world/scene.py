"""What a clip of the small world can show: one or two plain shapes on a plain or textured background.

Colours, shapes, textures and motions by name, what keeps two colours apart, random meanings, and which of them training
never sees.
"""
from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

# RGB, 0..255; every pair is at least 80 apart, so that a blurred colour is still read right.
COLOURS = {
    "red": (222, 36, 40), "orange": (244, 140, 28), "yellow": (246, 226, 54), "green": (36, 158, 62),
    "cyan": (66, 208, 214), "blue": (36, 66, 214), "purple": (132, 44, 176), "pink": (250, 138, 190),
    "white": (242, 242, 242), "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered", "dotted")
DIRECTIONS = {  # unit steps, x to the right, y down
    "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
    "up-left": (-1, -1), "up-right": (1, -1), "down-left": (-1, 1), "down-right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "still", "spin", "grow", "shrink", "bounce-sideways", "bounce-up-down")
PAIR_MOTIONS = ("left", "right", "up", "down", "still", "spin", "grow", "shrink")  # a pair shares the frame: short ways only
SIZES = {"small": 15.0, "": 21.0, "large": 28.0}  # radius in pixels of a 128-pixel-high frame; "" is said by no word
ROUND = ("circle", "ring")  # turning does not show on these

HEIGHT, WIDTH, FRAMES, FPS = 128, 192, 33, 8
MIN_CONTRAST = 100.0  # RGB distance between a shape and both tones of its background
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Thing:
    """One shape and what it does. A field is None where a caption leaves it open."""

    colour: str | None
    shape: str | None
    motion: str | None
    size: str = ""


@dataclass(frozen=True)
class Meaning:
    """What a clip shows: one or two things, from left to right, and the background."""

    things: tuple[Thing, ...]
    texture: str | None
    background: str | None
    unknown: tuple[str, ...] = field(default=(), compare=False)  # words of the caption that the world has no use for

    @property
    def complete(self) -> bool:
        """True if every part is stated in the world's own terms."""
        parts = [self.texture, self.background] + [p for t in self.things for p in (t.colour, t.shape, t.motion)]
        return bool(self.things) and None not in parts


def tones(colour: str) -> np.ndarray:
    """The two tones, `[2, 3]` float32 in 0..255, that a texture of this colour is made of (plain uses the first)."""
    base = np.array(COLOURS[colour], np.float32)
    dark = base.mean() < 120
    return np.stack([base, base * 0.74 + 255 * 0.26 if dark else base * 0.76]).astype(np.float32)


def contrast(first: str, second: str) -> float:
    """RGB distance between a shape's colour and the nearer tone of a background."""
    return float(np.linalg.norm(tones(second) - np.array(COLOURS[first], np.float32), axis=1).min())


def held_out(meaning: Meaning) -> bool:
    """True for the combinations that training never sees: a fixed hash of each thing with its background, one in 16."""
    return any(
        zlib.crc32(f"{t.shape}|{t.colour}|{t.motion}|{meaning.texture}|{meaning.background}".encode()) % HELD_OUT_ONE_IN == 0
        for t in meaning.things
    )


def draw_meaning(rng: np.random.Generator, pair_share: float = 0.2) -> Meaning:
    """A random meaning; every part uniform, subject to contrast; `pair_share` of them hold two shapes."""
    names = list(COLOURS)
    pair = rng.random() < pair_share
    while True:
        background = names[rng.integers(len(names))]
        texture = TEXTURES[rng.integers(len(TEXTURES))]
        things = []
        for _ in range(2 if pair else 1):
            motions = PAIR_MOTIONS if pair else MOTIONS
            motion = motions[rng.integers(len(motions))]
            shapes = [s for s in SHAPES if s not in ROUND] if motion == "spin" else SHAPES
            sizes = ("",) if motion in ("grow", "shrink") else (("small", "") if pair else tuple(SIZES))
            things.append(Thing(names[rng.integers(len(names))], shapes[rng.integers(len(shapes))], motion,
                                sizes[rng.integers(len(sizes))]))
        apart = all(contrast(t.colour, background) >= MIN_CONTRAST for t in things)
        if pair:
            first, second = (np.array(COLOURS[t.colour], np.float32) for t in things)
            apart = apart and np.linalg.norm(first - second) >= MIN_CONTRAST
        if apart:
            return Meaning(tuple(things), texture, background)


def draw_meanings(count: int, seed: int, held: bool = False, pair_share: float = 0.2) -> list[Meaning]:
    """`count` meanings, all held out of training (`held`) or none."""
    rng = np.random.default_rng(seed)
    found: list[Meaning] = []
    while len(found) < count:
        meaning = draw_meaning(rng, pair_share)
        if held_out(meaning) == held:
            found.append(meaning)
    return found
