"""Prompt adherence: does a video show what its caption asks for, in the small model's world?

From the frames alone: find the background among the world's colours and textures, what stands out from it, its colour,
its shape (overlap with turned templates) and its motion (path, size and turn over the frames); then compare with the
meaning of the caption. NumPy only.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from . import world

NAME, UNIT, HIGHER_IS_BETTER = "prompt adherence", "fraction", True
PARTS = ("colour", "shape", "motion", "background")

FOREGROUND_DISTANCE = 48.0  # RGB distance from the background at which a pixel belongs to a shape
BACKGROUND_TOLERANCE = 45.0
BACKGROUND_SHARE = 0.55  # of all pixels that must agree with the background found
MIN_PRESENCE = 0.8  # share of the frames in which a shape must be seen
MIN_OVERLAP = 0.72  # intersection over union with the best template
GRID = 40  # samples across the normalised crop that is compared with the templates
GRID_SPAN = 2.0  # half width of that crop in radii of gyration
TURN_STEP = np.deg2rad(4.0)
SYMMETRY = {"circle": None, "ring": None, "square": 90, "cross": 90, "triangle": 120, "star": 72}  # degrees; None: all


@dataclass(frozen=True)
class Seen:
    """One shape as found in the frames."""

    colour: str
    shape: str | None
    motion: str | None
    overlap: float


@dataclass(frozen=True)
class Scene:
    """What the frames show: shapes from left to right, and the background (None where nothing fits)."""

    things: tuple[Seen, ...]
    texture: str | None
    background: str | None

    def __str__(self) -> str:
        things = " and ".join(f"{t.colour} {t.shape or 'something'} ({t.motion or 'motion unclear'})" for t in self.things)
        ground = f"{self.texture} {self.background} background" if self.background else "no clear background"
        return f"{things or 'no shape'} on {ground}"


@dataclass(frozen=True)
class Adherence:
    """Verdict per part; a part that the caption leaves open counts as met."""

    colour: bool
    shape: bool
    motion: bool
    background: bool
    scene: Scene
    meaning: world.Meaning

    @property
    def all(self) -> bool:
        return self.colour and self.shape and self.motion and self.background


def score(frames: np.ndarray, caption: str) -> Adherence:
    """Judge a video against its caption.

    Args:
        frames: uint8 `[F, H, W, 3]`, RGB, at least 5 frames of at least 32 x 32.
        caption: English, as `world.parse` reads it.

    Raises:
        ValueError: frames of another shape or dtype.
    """
    scene, meaning = look(frames), world.parse(caption)
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


def look(frames: np.ndarray) -> Scene:
    """Describe the frames (uint8 `[F, H, W, 3]`) in the world's terms, without knowing any caption."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 [frames, height, width, 3]")
    if frames.shape[0] < 5 or min(frames.shape[1:3]) < 32:
        raise ValueError(f"frames are {frames.shape}: at least 5 frames of 32 x 32 are needed to judge a motion")
    video = frames.astype(np.float32)
    texture, background, ground = _background(video)
    if background is None:
        return Scene((), None, None)
    offset = video - ground
    mask = np.einsum("fhwc,fhwc->fhw", offset, offset) > FOREGROUND_DISTANCE**2
    found = []
    colours = _colours(video, mask)
    for colour, rgb in colours:
        seen = _thing(colour, _coverage(offset, ground, rgb, [other for _, other in colours if other is not rgb]))
        if seen is not None:
            found.append(seen)
    found.sort(key=lambda pair: pair[0])
    return Scene(tuple(seen for _, seen in found), texture, background)


@lru_cache(maxsize=4)
def _grounds(height: int, width: int):
    """Every background of the world: names, texture weights `[4, H, W]` and tones `[40, 2, 3]`."""
    names = [(t, c) for c in world.COLOURS for t in world.TEXTURES]
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    weights = np.stack([world.texture_weight(t, x, y, height / world.HEIGHT) for t in world.TEXTURES]).astype(np.float32)
    return names, weights, np.stack([world.tones(c) for _, c in names])


def _background(video: np.ndarray):
    """The world's background nearest to most pixels, its tones then taken from the video: texture, colour, `[H, W, 3]`."""
    height, width = video.shape[1:3]
    names, weights, tones = _grounds(height, width)
    step = max(1, height // 64)
    picked = video[np.linspace(0, len(video) - 1, 5).astype(int), step // 2::step, step // 2::step]
    errors, shares = [], []
    for (texture, _), tone in zip(names, tones):
        weight = weights[world.TEXTURES.index(texture), step // 2::step, step // 2::step]
        distance = np.linalg.norm(picked - (tone[0] + weight[..., None] * (tone[1] - tone[0])), axis=-1)
        errors.append(np.minimum(distance, 1.4 * BACKGROUND_TOLERANCE).mean())
        shares.append((distance < BACKGROUND_TOLERANCE).mean())
    best = int(np.argmin(errors))
    if shares[best] < BACKGROUND_SHARE:
        return None, None, None
    weight = weights[world.TEXTURES.index(names[best][0])]
    tone = tones[best].copy()
    picked = video[:: max(1, len(video) // 8)]
    near = np.linalg.norm(picked - (tone[0] + weight[..., None] * (tone[1] - tone[0])), axis=-1) < BACKGROUND_TOLERANCE
    for i, region in enumerate((weight < 0.1, weight > 0.9)):
        chosen = near & region
        if chosen.sum() > 200:
            tone[i] = np.median(picked[chosen], axis=0)
    return (*names[best], tone[0] + weight[..., None] * (tone[1] - tone[0]))


def _erode(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    for axis in (1, 2):
        for shift in (1, -1):
            inner &= np.roll(mask, shift, axis)
    return inner


def _colours(video: np.ndarray, mask: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The world's colours that fill the inside of what stands out, most frequent first, with their mean RGB."""
    core = _erode(_erode(mask))
    if core.sum() < 3 * len(video):
        core = _erode(mask)
    pixels = video[core]
    if len(pixels) < 3 * len(video):
        return []
    names, palette = list(world.COLOURS), np.array(list(world.COLOURS.values()), np.float32)
    nearest = ((pixels[:, None] - palette) ** 2).sum(-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(names))
    return [(names[i], pixels[nearest == i].mean(0)) for i in np.argsort(-counts)
            if counts[i] >= 0.1 * len(pixels) and counts[i] >= 3 * len(video)]


def _coverage(offset, ground, rgb, others) -> np.ndarray:
    """How far each pixel lies on the way from the background to `rgb`, 0..1 `[F, H, W]`; 0 where another colour fits better."""

    def project(colour):
        way = colour - ground
        alpha = np.clip(np.einsum("fhwc,hwc->fhw", offset, way) / (way * way).sum(-1), 0, 1)
        miss = offset - alpha[..., None] * way
        return alpha, np.einsum("fhwc,fhwc->fhw", miss, miss)

    alpha, miss = project(rgb)
    alpha = np.where((alpha > 0.25) & (miss < 70.0**2), alpha, 0)
    for other in others:
        other_alpha, other_miss = project(other)
        alpha = np.where((other_miss < miss) & (other_alpha > 0.25), 0, alpha)
    return alpha


def _thing(colour: str, alpha: np.ndarray):
    """Follow one colour through the frames: (mean x, Seen), or None if it is hardly ever there."""
    count, height, width = alpha.shape
    unit = height / world.HEIGHT
    ys, xs = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    area, x, y, spread = (np.full(count, np.nan) for _ in range(4))
    kept = alpha
    for _ in range(2):  # twice: the second time without specks far from the first centre
        area = kept.sum((1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            x, y = (kept.sum(1) @ xs) / area, (kept.sum(2) @ ys) / area
        reach = 1.25 * np.sqrt(area) + 3 * unit
        away = (xs[None, None] - x[:, None, None]) ** 2 + (ys[None, :, None] - y[:, None, None]) ** 2
        kept = np.where(away <= (reach**2)[:, None, None], kept, 0)
    present = area > 60 * unit**2
    if present.mean() < MIN_PRESENCE:
        return None
    area = kept.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (kept.sum(1) @ xs) / area, (kept.sum(2) @ ys) / area
        away = (xs[None, None] - x[:, None, None]) ** 2 + (ys[None, :, None] - y[:, None, None]) ** 2
        spread = np.sqrt((kept * away).sum((1, 2)) / area)
    present &= np.isfinite(spread) & (spread > 1)
    if present.mean() < MIN_PRESENCE:
        return None
    kept, x, y, spread, area = kept[present], x[present], y[present], spread[present], area[present]
    shape, overlap, turn = _shape(kept, x, y, spread)
    motion = _motion(x / unit, y / unit, np.sqrt(area), turn)
    return float(x.mean()), Seen(colour, shape if overlap >= MIN_OVERLAP else None, motion, overlap)


@lru_cache(maxsize=1)
def _templates():
    """Normalised shapes at every turn: names, degrees, flattened coverage `[T, GRID * GRID]`."""
    names, turns, images = [], [], []
    fine = (np.arange(4 * GRID) + 0.5) / (4 * GRID) * 2 - 1
    for shape, period in SYMMETRY.items():
        u, v = np.meshgrid(fine * 1.3, fine * 1.3)
        inside = world.signed_distance(shape, u, v) < 0
        gyration = np.sqrt((u * u + v * v)[inside].mean())
        u, v = np.meshgrid(fine * GRID_SPAN * gyration, fine * GRID_SPAN * gyration)
        for turn in np.arange(0, np.deg2rad(period), TURN_STEP) if period else [0.0]:
            ru, rv = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
            full = (world.signed_distance(shape, ru, rv) < 0).astype(np.float32)
            names.append(shape)
            turns.append(turn)
            images.append(full.reshape(GRID, 4, GRID, 4).mean((1, 3)).ravel())
    return np.array(names), np.array(turns), np.array(images, np.float32)


def _shape(alpha, x, y, spread):
    """Best shape, its mean overlap over the frames, and its turn in every frame (radians, within its symmetry)."""
    names, turns, images = _templates()
    count, height, width = alpha.shape
    line = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * GRID_SPAN
    px = np.clip(x[:, None] + line * spread[:, None], 0, width - 1.001)
    py = np.clip(y[:, None] + line * spread[:, None], 0, height - 1.001)
    x0, y0 = px.astype(int), py.astype(int)
    fx, fy = (px - x0)[:, None, :], (py - y0)[:, :, None]
    f = np.arange(count)[:, None, None]
    crop = ((1 - fy) * ((1 - fx) * alpha[f, y0[:, :, None], x0[:, None]] + fx * alpha[f, y0[:, :, None], x0[:, None] + 1])
            + fy * ((1 - fx) * alpha[f, y0[:, :, None] + 1, x0[:, None]] + fx * alpha[f, y0[:, :, None] + 1, x0[:, None] + 1]))
    crop = crop.reshape(count, -1).astype(np.float32)
    # sum of minima and maxima of values in 0..1: min = (a + b - |a - b|) / 2
    apart = np.stack([np.abs(crop - image).sum(1) for image in images], 1)
    total = crop.sum(1)[:, None] + images.sum(1)
    overlap = (total - apart) / (total + apart)
    best_of = {shape: overlap[:, names == shape].max(1) for shape in SYMMETRY}
    shape = max(best_of, key=lambda s: best_of[s].mean())
    turn = turns[names == shape][overlap[:, names == shape].argmax(1)]
    return shape, float(best_of[shape].mean()), _unwrap(turn, SYMMETRY[shape])


def _unwrap(turn: np.ndarray, period: int | None) -> np.ndarray:
    if period is None:
        return np.zeros_like(turn)
    period = np.deg2rad(period)
    steps = np.mod(np.diff(turn) + period / 2, period) - period / 2
    return np.concatenate([[0.0], np.cumsum(steps)])


def _reverses(path: np.ndarray, least: float) -> bool:
    """True if the path goes at least `least` one way and then at least `least` back."""
    for sign in (1, -1):
        high = np.maximum.accumulate(sign * path)
        rise = high - np.minimum.accumulate(sign * path)  # how far it had come before
        fall = high - sign * path
        if ((fall >= least) & (rise >= least) & (high - sign * path[0] >= least)).any():
            return True
    return False


def _motion(x: np.ndarray, y: np.ndarray, size: np.ndarray, turn: np.ndarray) -> str | None:
    """Name the motion of a path in pixels of a 128-high frame, with size and turn (radians) per frame."""
    ends = max(1, len(x) // 10)
    growth = size[-ends:].mean() / size[:ends].mean()
    if _reverses(x, 18) and np.ptp(y) < 14:
        return "bounce-sideways"
    if _reverses(y, 18) and np.ptp(x) < 14:
        return "bounce-up-down"
    dx, dy = x[-1] - x[0], y[-1] - y[0]
    way = np.hypot(dx, dy)
    if growth > 1.45 or growth < 1 / 1.45:
        return ("grow" if growth > 1 else "shrink") if way < 16 else None
    if way > 18:
        sector = int(np.round(np.arctan2(dy, dx) / (np.pi / 4))) % 8
        return ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")[sector]
    if way > 9 or max(np.ptp(x), np.ptp(y)) > 12:
        return None
    walked = np.abs(np.diff(turn)).sum()
    if abs(turn[-1]) > np.deg2rad(80) and abs(turn[-1]) > 0.6 * walked:
        return "spin"
    return "still" if abs(turn[-1]) < np.deg2rad(40) else None
