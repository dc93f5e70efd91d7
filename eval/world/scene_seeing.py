"""What the frames of a long clip show, in its world's terms: background, camera, and things that may cover each other.

From the frames alone, seen at 128 pixels of height. No two things of a clip share a colour, so each colour that stands out from
the background is followed through the frames; shape and motion are read off those frames in which nothing touches it and it is
whole. NumPy only.
"""
from __future__ import annotations

import numpy as np

from .ground_seeing import see_ground
from .recognition import SYMMETRY, cut, edge_widths, motion_of, shape_of
from .scene import COLOURS, DIRECTIONS, HEIGHT
from .seeing import (
    EDGE_REACH,
    EXTRA_PRESENCE,
    EXTRA_SHARE,
    FOREGROUND_DISTANCE,
    LEAST_AREA,
    MAX_EDGE,
    MIN_OVERLAP,
    Scene,
    Seen,
    _dilate,
    _erode,
    _square,
    check_frames,
    largest_areas,
    moments,
)

PRESENCE = 0.45  # share of the frames in which a thing's colour must be seen: some come late or leave early
STAYS = 0.8  # the same, of a thing that neither enters nor leaves
LEAST_FRAMES = 5  # in which a thing is whole and touched by nothing
TOUCH = 2  # pixels between two things that still touch
TRACE = 0.05  # of its area that counts as being there
PART = 0.7  # of its area: what a thing that enters or leaves shows at most in the first or last frame
MOSTLY = 0.6  # of its area that a thing shows where its place is still read
BOUNCES = ("bounce-sideways", "bounce-up-down")
WAY_IN = 18.0  # pixels that it goes at least
DRIFT = 14.0  # pixels that it goes along the edge at most
STEADY = 0.7  # how well the turns of all frames agree with one steady turn, 0..1
TURNS = np.deg2rad(np.arange(-320, 321, 2))  # over a whole clip


def look(frames: np.ndarray) -> Scene:
    """Describe the frames (uint8 `[F, H, W, 3]`) in the long world's terms, without knowing any caption.

    Raises:
        ValueError: frames of another shape or dtype, too few or too small."""
    frames = check_frames(frames)
    factor = max(1, round(frames.shape[1] / HEIGHT))
    video = _shrunk(frames, factor)
    unit = frames.shape[1] / factor / HEIGHT
    ground = see_ground(video, unit)
    if ground is None:
        return Scene((), None, None)
    found = []
    far = np.sqrt(ground.apart)
    names, away = _colours(video, ground.apart, unit)
    for i, name in enumerate(names):
        rest = np.minimum.reduce([far, *(d for j, d in enumerate(away) if j != i)])
        alpha = rest / np.maximum(rest + away[i], 1e-6)
        others = np.zeros(far.shape, bool)
        for j, d in enumerate(away):
            if j != i:
                others |= _erode((d < far) & (d < away[i]))
        found += _thing(name, alpha, others, unit)
    found.sort(key=lambda pair: pair[0])
    return Scene(tuple(seen for _, seen in found), ground.texture, ground.colour, ground.camera)


def _shrunk(frames: np.ndarray, factor: int) -> np.ndarray:
    """Means of `factor` x `factor` pixels, float32 `[3, F, H, W]`; what is left over on the right and below is dropped."""
    count, height, width = frames.shape[0], frames.shape[1] // factor, frames.shape[2] // factor
    small = np.empty((3, count, height, width), np.float32)
    for i, frame in enumerate(frames):
        frame = frame[: height * factor, : width * factor].astype(np.uint32)
        rows = sum(frame[k::factor] for k in range(factor))
        small[:, i] = sum(rows[:, k::factor] for k in range(factor)).transpose(2, 0, 1)
    small /= np.float32(factor**2)
    return small


def _colours(video: np.ndarray, apart: np.ndarray, unit: float) -> tuple[list[str], list[np.ndarray]]:
    """The colours of the things, and each pixel's distance from each of them `[F, H, W]`."""
    outside = apart > FOREGROUND_DISTANCE**2
    pixels = video[:, outside]
    palette = np.array(list(COLOURS.values()), np.float32)
    nearest = np.full(outside.shape, -1, np.int8)
    nearest[outside] = np.argmin([_square(pixels - colour[:, None]) for colour in palette], axis=0)
    names, away = [], []
    for i, name in enumerate(COLOURS):
        own = nearest == i
        core = _erode(own).sum((1, 2))
        if (core > LEAST_AREA / 2 * unit**2).mean() >= PRESENCE:
            rgb = np.median(video[:, _erode(own)], axis=1)
            names.append(name)
            away.append(np.sqrt(_square(video - rgb[:, None, None, None])))
    return names, away


def _thing(colour: str, alpha: np.ndarray, others: np.ndarray, unit: float) -> list[tuple[float, Seen]]:
    """Follow one colour, whose share in each pixel is `alpha` `[F, H, W]`, past `others`: (mean x, Seen) of it, and of a
    second thing of its colour."""
    solid = alpha > 0.5
    solid &= _dilate(_erode(solid), 2)  # the edge of another thing may have this colour too, but is thin
    areas = largest_areas(solid)
    if areas is None:
        return []
    main, area, second = areas
    there = area > LEAST_AREA * unit**2
    left, right = (main[:, :, edge].any((1, 2)) for edge in (slice(0, 2), slice(-2, None)))
    rim = left | right | main[:, :2].any((1, 2)) | main[:, -2:].any((1, 2))
    touched = (_dilate(main, TOUCH) & others).any((1, 2))
    whole = np.flatnonzero(there & ~rim & ~touched)
    if len(whole) < LEAST_FRAMES:
        whole = np.flatnonzero(there & ~rim)
    if there.mean() < PRESENCE or len(whole) < LEAST_FRAMES:
        return []
    extra = (second > LEAST_AREA * unit**2) & (second > EXTRA_SHARE * area)
    near = _dilate(main[whole], max(3, round(EDGE_REACH * unit)))
    edges = edge_widths(np.where(near, alpha[whole], 0), main[whole])
    kept = np.where(_dilate(main[whole], 2), cut(alpha[whole]), 0)
    x, y, spread, size = moments(kept)
    shape, overlap, turn = shape_of(kept, x, y, spread, edges)
    turned = steady_turn(turn, whole / (len(alpha) - 1), SYMMETRY[shape] if shape else None)
    motion = crossing(x / unit, y / unit, area / np.median(area[whole]), left, right)
    if motion is None:
        motion = motion_of(x / unit, y / unit, np.sqrt(size), turned * np.linspace(0, 1, len(whole)))
        shown = np.flatnonzero(there & ~rim & (area > MOSTLY * np.median(area[whole])))  # partly covered: good for a long way
        u, v, *_ = moments(main[shown].astype(np.float32))
        farther = motion_of(u / unit, v / unit, np.full(len(shown), 1.0), np.zeros(len(shown)))
        if farther in BOUNCES or (motion in (None, "still") and farther in DIRECTIONS):
            motion = farther
        motion = motion if there.mean() >= STAYS else None
    width = float(np.median(edges))
    clear = overlap >= MIN_OVERLAP and width < MAX_EDGE * unit
    found = [(float(x.mean()), Seen(colour, shape if clear else None, motion, overlap, width))]
    if extra[whole].mean() >= EXTRA_PRESENCE:
        found.append((float(x.mean()), Seen(colour, None, None, 0.0, 0.0)))
    return found


def steady_turn(turn: np.ndarray, time: np.ndarray, period: int | None) -> float:
    """The steady turn over a whole clip (radians) that the turns of some frames at `time` (0..1) agree with, within the shape's
    symmetry of `period` degrees; 60 degrees, which is neither a spin nor a standstill, where they agree with none."""
    if period is None:
        return 0.0
    waves = np.exp(1j * (turn - TURNS[:, None] * time) * 360 / period)
    agree = np.abs(waves.mean(1))
    best = int(agree.argmax())
    return float(TURNS[best]) if agree[best] > STEADY else np.deg2rad(60.0)


def crossing(x: np.ndarray, y: np.ndarray, shown: np.ndarray, left: np.ndarray, right: np.ndarray) -> str | None:
    """Name how a thing enters or leaves; None if it does not.

    Args:
        x, y: its path in the frames in which it is whole.
        shown: its area in every frame, as a share of the whole one; left, right: whether it touches that edge then."""
    if np.ptp(y) > DRIFT or abs(x[-1] - x[0]) < WAY_IN:
        return None
    seen = np.flatnonzero(shown > TRACE)
    for word, at, whole_at, inwards in (("enter", seen[0], seen[-1], x[-1] - x[0]), ("leave", seen[-1], seen[0], x[0] - x[-1])):
        end = 0 if word == "enter" else len(shown) - 1
        for side, edge, way in (("left", left, inwards), ("right", right, -inwards)):
            if edge[at] and shown[end] < PART and not (left | right)[whole_at] and way > 0:
                return f"{word}-{side}"
    return None
