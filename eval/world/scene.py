"""What a clip can show, in two worlds: plain shapes that move over a background, and in the second a camera that moves too.

Colours, shapes, textures and motions by name, what keeps two colours apart, random meanings, and which of them training
never sees. `SMALL` is the world of the 896-token model, `LONG` the one of 49 frames of 384 x 512.
"""
from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cache

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
class World:
    """What there is in a world, and how large its clips are.

    Attributes:
        height, width, frames: of a clip, in pixels.
        textures: kind of background -> its share of the clips.
        cameras: what the camera can do; empty where the world has none. Over a texture in `unmarked` it stands still, since
            nothing would show that it moves.
        counts: number of things -> its share of the clips.
        shade: how far the second tone of a background lies from its colour towards white or black, 0..1.
    """

    name: str
    height: int
    width: int
    frames: int
    motions: tuple[str, ...]
    textures: dict[str, float]
    counts: dict[int, float]
    cameras: tuple[str, ...] = ()
    unmarked: tuple[str, ...] = ()
    shade: float = 0.25
    fps: int = FPS

    @property
    def most_things(self) -> int:
        return max(self.counts)

    def __reduce__(self):
        """There is one world of a name, in every process."""
        return _world_of, (self.name,)


def _world_of(name: str) -> World:
    return WORLDS[name]


CAMERAS = ("still", "pan-left", "pan-right", "pan-up", "pan-down", "zoom-in", "zoom-out")
CROSSINGS = {"enter-left": "left", "enter-right": "right", "leave-left": "left", "leave-right": "right"}  # over which edge
SMALL = World("shapes", HEIGHT, WIDTH, FRAMES, MOTIONS, dict.fromkeys(TEXTURES, 0.25), {1: 0.8, 2: 0.2})
LONG = World(
    "scenes", 384, 512, 49, (*MOTIONS, *CROSSINGS),
    {"plain": 0.15, "shaded": 0.15, "striped": 0.23, "checkered": 0.23, "cloudy": 0.24}, {2: 0.75, 3: 0.25},
    CAMERAS, ("plain", "shaded"), shade=0.4)
CAMERA_MOVES = 0.7  # share of the clips over a background that shows it
WORLDS = {world.name: world for world in (SMALL, LONG)}


@dataclass(frozen=True)
class Thing:
    """One shape and what it does. A field is None where a caption leaves it open."""

    colour: str | None
    shape: str | None
    motion: str | None
    size: str = ""


@dataclass(frozen=True)
class Meaning:
    """What a clip shows: its things, the background, and what the camera does (None in a world without one).

    Two things of the small world stand from left to right. In the long world a later one passes in front of an earlier one;
    what they do is said of the picture, so that a thing which stands still keeps its place in it while the camera pans."""

    things: tuple[Thing, ...]
    texture: str | None
    background: str | None
    unknown: tuple[str, ...] = field(default=(), compare=False)  # words of the caption that the world has no use for
    camera: str | None = None

    @property
    def complete(self) -> bool:
        """True if every part is stated in the world's own terms."""
        parts = [self.texture, self.background] + [p for t in self.things for p in (t.colour, t.shape, t.motion)]
        return bool(self.things) and None not in parts


def tones(colour: str, world: World = SMALL) -> np.ndarray:
    """The two tones, `[2, 3]` float32 in 0..255, that a texture of this colour is made of (plain uses the first)."""
    base = np.array(COLOURS[colour], np.float32)
    dark = base.mean() < 120
    if world is SMALL:
        return np.stack([base, base * 0.74 + 255 * 0.26 if dark else base * 0.76]).astype(np.float32)
    return np.stack([base, base + world.shade * (255.0 * dark - base)]).astype(np.float32)


def contrast(first: str, second: str, world: World = SMALL) -> float:
    """RGB distance between a shape's colour and the nearest colour of a background: a tone, or in the long world, whose
    backgrounds blend, any mixture of the two."""
    return _contrast(first, second, world.name)


@cache
def _contrast(first: str, second: str, name: str) -> float:
    world = WORLDS[name]
    ends, colour = tones(second, world), np.array(COLOURS[first], np.float32)
    if world is SMALL:
        return float(np.linalg.norm(ends - colour, axis=1).min())
    way = ends[1] - ends[0]
    share = np.clip((colour - ends[0]) @ way / (way @ way), 0, 1)
    return float(np.linalg.norm(ends[0] + share * way - colour))


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


@dataclass(frozen=True)
class More:
    """What a thing of the long world does more often than the world has it: the probabilities that it spins, or is small,
    whatever would be drawn otherwise."""

    spin: float = 0.0
    small: float = 0.0

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; give a probability, 0 to 1")


def draw_scene(rng: np.random.Generator, counts: dict[int, float] | None = None, more: More | None = None) -> Meaning:
    """A random meaning of the long world, every part by its share; `counts` instead of the world's own number of things, `more`
    of what a thing does oftener."""
    world, names = LONG, list(COLOURS)
    count = _by_share(rng, counts or world.counts)
    while True:
        background, texture = names[rng.integers(len(names))], _by_share(rng, world.textures)
        camera = "still"
        if texture not in world.unmarked and rng.random() < CAMERA_MOVES:
            camera = CAMERAS[rng.integers(1, len(CAMERAS))]
        things = []
        for _ in range(count):
            motion = "spin" if more and rng.random() < more.spin else world.motions[rng.integers(len(world.motions))]
            shapes = [s for s in SHAPES if s not in ROUND] if motion == "spin" else SHAPES
            sizes = ("",) if motion in ("grow", "shrink") else tuple(SIZES)
            if more and len(sizes) > 1 and rng.random() < more.small:
                sizes = ("small",)
            things.append(Thing(names[rng.integers(len(names))], shapes[rng.integers(len(shapes))], motion,
                                sizes[rng.integers(len(sizes))]))
        if all(contrast(t.colour, background, world) >= MIN_CONTRAST for t in things) and all(
                _apart(a.colour, b.colour) >= MIN_CONTRAST for i, a in enumerate(things) for b in things[:i]):
            return Meaning(tuple(things), texture, background, camera=camera)


@cache
def _apart(first: str, second: str) -> float:
    return float(np.linalg.norm(np.array(COLOURS[first], np.float32) - np.array(COLOURS[second], np.float32)))


def _by_share(rng: np.random.Generator, shares: dict):
    return list(shares)[int(np.searchsorted(np.cumsum(list(shares.values())) / sum(shares.values()), rng.random(), "right"))]


def draw_meanings(count: int, seed: int, held: bool = False, pair_share: float = 0.2, world: World = SMALL,
                  counts: dict[int, float] | None = None, more: More | None = None) -> list[Meaning]:
    """`count` meanings, all held out of training (`held`) or none; `pair_share` is the small world's, `counts` and `more` the
    long's."""
    rng = np.random.default_rng(seed)
    found: list[Meaning] = []
    while len(found) < count:
        meaning = draw_meaning(rng, pair_share) if world is SMALL else draw_scene(rng, counts, more)
        if held_out(meaning) == held:
            found.append(meaning)
    return found
