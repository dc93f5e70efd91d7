"""Where the things of a long clip are: they cross, pass in front of each other, enter and leave.

A clip is drawn again until nothing is hidden for too long. Lengths are in pixels of a frame 128 high.
"""
from __future__ import annotations

import numpy as np

from .scene import CROSSINGS, DIRECTIONS, HEIGHT, LONG, Meaning, Thing

RADII = {"small": 12.0, "": 17.0, "large": 23.0}
GROW_RADII = (11.0, 24.0)
SPIN_DEGREES = 225.0
WIDTH = HEIGHT * LONG.width / LONG.height
REACH = 1.16  # of a shape's farthest point, in radii
HIDDEN, TOUCHED = 0.62, 0.9  # distances, in sums of two radii, below which the thing behind is mostly covered; is overlapped
MOST_HIDDEN, MOST_TOUCHED, MOST_TOUCHED_INSIDE = 0.14, 0.36, 0.2  # shares of the frames
MEETINGS = 0.6  # share of the clips in which one thing has to pass in front of another
TRIES = 40


def _between(rng: np.random.Generator, low, high):
    return rng.uniform(low, np.maximum(low, high))


def path(thing: Thing, rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """x, y, radius, angle `[4, F]` over the times `t` in 0..1."""
    radius, angle = np.full(t.shape, RADII[thing.size]), np.zeros(t.shape)
    if thing.motion in ("grow", "shrink"):
        radius = GROW_RADII[0] + (GROW_RADII[1] - GROW_RADII[0]) * (t if thing.motion == "grow" else 1 - t)
    if thing.motion == "spin":
        angle = np.deg2rad(SPIN_DEGREES) * t
    margin = radius.max() * REACH + 1
    low, high = np.array([margin, margin]), np.array([WIDTH - margin, HEIGHT - margin])
    span = high - low
    if thing.motion in CROSSINGS:
        outside, inside = -margin - rng.uniform(4, 10), rng.uniform(0.5, 0.8) * WIDTH
        way = t if thing.motion.startswith("enter") else 1 - t
        x = outside + (inside - outside) * way
        x = WIDTH - x if thing.motion.endswith("right") else x
        return np.stack([x, np.full(t.shape, rng.uniform(low[1], high[1])), radius, angle])
    if thing.motion.startswith("bounce"):
        axis, laps = (0, 1.5) if thing.motion == "bounce-sideways" else (1, 1.8)
        wave = 1 - np.abs(1 - np.mod(rng.uniform(0, 0.2) + laps * t, 2.0))
        wave = wave if rng.random() < 0.5 else 1 - wave
        length = _between(rng, 50.0, min(span[axis], 80.0))
        start = rng.uniform(low, high)
        centre = [np.full(t.shape, start[0]), np.full(t.shape, start[1])]
        centre[axis] = rng.uniform(low[axis], high[axis] - length) + length * wave
        return np.stack([*centre, radius, angle])
    step = np.array(DIRECTIONS.get(thing.motion, (0, 0)), float)
    if step.all():
        step *= _between(rng, 40.0, min(span.min(), 66.0))
    else:
        step *= _between(rng, 48.0, min(span[0], 100.0)) if step[0] else _between(rng, 44.0, min(span[1], 80.0))
    start = rng.uniform(low - np.minimum(step, 0), high - np.maximum(step, 0))
    return np.stack([start[0] + step[0] * t, start[1] + step[1] * t, radius, angle])


def overlaps(paths: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Shares of the frames in which each thing is mostly hidden and in which another one touches it; whether any two meet."""
    hidden, touched, meet = np.zeros(len(paths)), np.zeros(len(paths)), False
    for front in range(len(paths)):
        for back in range(front):
            (x, y, r, _), (u, v, s, _) = paths[front], paths[back]
            near = np.hypot(x - u, y - v) / (r + s)
            hidden[back] += (near < HIDDEN).mean()
            touched[[back, front]] += (near < TOUCHED).mean()
            meet |= bool((near < 0.75).any())
    return hidden, touched, meet


def place(meaning: Meaning, rng: np.random.Generator, t: np.ndarray) -> list[np.ndarray]:
    """Paths `[4, F]` of a clip's things, a later one in front of an earlier one."""
    wanted, best, least = rng.random() < MEETINGS, None, np.inf
    most = np.array([MOST_TOUCHED_INSIDE if thing.motion in ("spin", "grow", "shrink") else MOST_TOUCHED
                     for thing in meaning.things])
    for _ in range(TRIES):
        paths = [path(thing, rng, t) for thing in meaning.things]
        hidden, touched, meet = overlaps(paths)
        excess = np.maximum(hidden - MOST_HIDDEN, 0).sum() * 3 + np.maximum(touched - most, 0).sum()
        if excess == 0 and (meet or not wanted):
            return paths
        excess += 0.01 * (wanted and not meet)
        if excess < least:
            best, least = paths, excess
    return best
