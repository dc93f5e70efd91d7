"""Where every shape of a clip is in every frame: `plan` draws places, sizes and speeds.

In the small world they stay inside the frame; the long world's are in crossings.py, its cameras in grounds.py."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .crossings import place
from .grounds import Ground, plan_grounds
from .scene import COLOURS, DIRECTIONS, HEIGHT, SHAPES, SIZES, SMALL, WIDTH, Meaning, Thing, World, tones

SPIN_DEGREES = 225.0
GROW_RADII = (12.0, 29.0)
PAIR_GROW_RADII = (12.0, 25.0)


@dataclass(frozen=True)
class Plan:
    """Where everything is in every frame, in pixels of the frame; arrays of a batch of B clips with N shapes in all.

    clip [N] int, shape [N] int, rgb [N, 3], x/y/radius/angle [N, F] (angle in radians, clockwise),
    tone [B, 2, 3] and texture [B] int of the backgrounds, and in the long world how they lie and move (in units of its own).
    Of a clip's shapes a later one is in front.
    """

    clip: np.ndarray
    shape: np.ndarray
    rgb: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    tone: np.ndarray
    texture: np.ndarray
    ground: Ground | None = None

    def take(self, index) -> Plan:
        """The plan of the clips in `index`, in that order."""
        index = np.asarray(index)
        rows = [np.flatnonzero(self.clip == i) for i in index] if len(index) < 64 else None
        if rows is None:  # sorted by clip, so a searchsorted serves large batches
            lo, hi = np.searchsorted(self.clip, index, "left"), np.searchsorted(self.clip, index, "right")
            rows = [np.arange(a, b) for a, b in zip(lo, hi)]
        clip = np.concatenate([np.full(len(r), n) for n, r in enumerate(rows)])
        row = np.concatenate(rows)
        return Plan(clip, self.shape[row], self.rgb[row], self.x[row], self.y[row], self.radius[row], self.angle[row],
                    self.tone[index], self.texture[index], self.ground and self.ground.take(index))


def _path(thing: Thing, rng: np.random.Generator, t: np.ndarray, left: float, right: float, pair: bool):
    """x, y, radius, angle over the times `t` in 0..1, in a frame of 192 x 128 between `left` and `right`."""
    radius = np.full(t.shape, SIZES[thing.size])
    angle = np.zeros(t.shape)
    if thing.motion in ("grow", "shrink"):
        a, b = PAIR_GROW_RADII if pair else GROW_RADII
        radius = a + (b - a) * (t if thing.motion == "grow" else 1 - t)
    if thing.motion == "spin":
        angle = np.deg2rad(SPIN_DEGREES) * t
    margin = radius.max() * 1.16 + 1
    low, high = np.array([left + margin, margin]), np.array([right - margin, HEIGHT - margin])
    span = high - low
    if thing.motion.startswith("bounce"):
        axis, laps = (0, 1.5) if thing.motion == "bounce-sideways" else (1, 2.2)
        phase = rng.uniform(0, 0.2) + laps * t
        wave = 1 - np.abs(1 - np.mod(phase, 2.0))
        wave = wave if rng.random() < 0.5 else 1 - wave
        centre = [np.full(t.shape, rng.uniform(low[0], high[0])), np.full(t.shape, rng.uniform(low[1], high[1]))]
        centre[axis] = low[axis] + span[axis] * wave
        return centre[0], centre[1], radius, angle
    step = np.array(DIRECTIONS.get(thing.motion, (0, 0)), float)
    if step.all():
        length = rng.uniform(44, min(span.min(), 66))
    elif step[0]:
        length = rng.uniform(0.7, 1.0) * min(span[0], 100) if not pair else rng.uniform(30, span[0])
    else:
        length = rng.uniform(44, min(span[1], 80))
    step = step * length
    start = rng.uniform(low - np.minimum(step, 0), high - np.maximum(step, 0))
    return start[0] + step[0] * t, start[1] + step[1] * t, radius, angle


def plan(meanings: list[Meaning], seed: int, frames: int | None = None, height: int | None = None,
         world: World = SMALL) -> Plan:
    """Draw where everything is: seeded; the whole motion fits whatever number of frames (default: the world's own).

    Lengths are for frames of `height` (default: the world's own) and the world's width by height."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, frames or world.frames)
    clip, shape, rgb, paths = [], [], [], []
    for i, meaning in enumerate(meanings):
        pair = len(meaning.things) == 2
        if world is not SMALL:
            paths += place(meaning, rng, t)
        for j, thing in enumerate(meaning.things):
            if world is SMALL:
                left, right = ((0, WIDTH / 2), (WIDTH / 2, WIDTH))[j] if pair else (0, WIDTH)
                paths.append(_path(thing, rng, t, left, right, pair))
            clip.append(i)
            shape.append(SHAPES.index(thing.shape))
            rgb.append(COLOURS[thing.colour])
    x, y, radius, angle = (np.array(part, np.float32) for part in zip(*paths))
    unit = (height or world.height) / HEIGHT
    tone, names = np.stack([tones(m.background, world) for m in meanings]), list(world.textures)
    return Plan(np.array(clip), np.array(shape), np.array(rgb, np.float32), x * unit, y * unit, radius * unit, angle, tone,
                np.array([names.index(m.texture) for m in meanings]),
                None if world is SMALL else plan_grounds(meanings, tone, rng, t))
