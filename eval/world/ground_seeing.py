"""The background of a long clip, from its frames alone: its colour, its kind, and what the camera does over it.

Every background lies between two tones, so a pixel is a weight of the second one, and a distance from both. What stands out by
its distance is no background; the weights of the rest say the kind, by the directions in which they change, and the camera, by
how they move from frame to frame. NumPy only. Lengths are in pixels of a frame 128 high.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scene import COLOURS, LONG, tones
from .seeing import BACKGROUND_SHARE, BACKGROUND_TOLERANCE, FOREGROUND_DISTANCE, _dilate, _square

TONES = {name: tones(name, LONG) for name in COLOURS}
SMOOTHINGS = 2  # by 1/4, 1/2, 1/4 each way, before slopes are taken
BESIDE = 3  # pixels beside what stands out that say nothing of the background
FLAT = 0.09  # spread of a plain background's weights
PLAIN_WEIGHT = 0.35  # at most so near to its second tone is a plain one
SLANTED, SLANT_MISS = 0.1, 0.07  # spread of a shaded background's weights, and at most so much of it off a plane
ONE_WAY, TWO_WAYS = 0.6, 0.45  # how alike the directions of all slopes are, modulo 180 and modulo 90 degrees
PANNED, ZOOMED = 19.0, 0.17  # pixels, and the logarithm of how much larger things get, over the clip
NO_PAN, NO_ZOOM, STEADY_ZOOM = 10.0, 0.09, 0.14
ONLY_ACROSS = 0.12  # the slopes of stripes have at most so much of their strength along them
ASLANT = 0.6  # a pan along an axis goes at most so much of its way along the other


@dataclass(frozen=True)
class Ground:
    """What was found of the background: names (None where nothing fits), and of every pixel `[F, H, W]` the weight of the
    second tone, 0..1, the squared RGB distance from both, and whether it is background and far enough from what is not."""

    colour: str | None
    texture: str | None
    camera: str | None
    weight: np.ndarray
    apart: np.ndarray
    clear: np.ndarray


def between(video: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the second of two tones `[2, 3]` nearest to pixels `[3, ...]`, and the squared distance that is left."""
    way = (ends[1] - ends[0]).astype(np.float32)
    offset = video - ends[0].reshape(3, *[1] * (video.ndim - 1))
    weight = np.clip(np.tensordot(way, offset, 1) / (way @ way), 0, 1)
    return weight, _square(offset - way.reshape(3, *[1] * (video.ndim - 1)) * weight)


def see_ground(video: np.ndarray, unit: float) -> Ground | None:
    """The background of a video float32 `[3, F, H, W]`, frames 128 `unit`s high; None where most pixels agree with none."""
    some = video[:, np.linspace(0, video.shape[1] - 1, 7).astype(int), ::2, ::2]
    found = {name: between(some, ends)[1] for name, ends in TONES.items()}
    colour = min(found, key=lambda name: np.minimum(found[name], (1.4 * BACKGROUND_TOLERANCE) ** 2).mean())
    if (found[colour] < BACKGROUND_TOLERANCE**2).mean() < BACKGROUND_SHARE:
        return None
    weight, apart = between(video, TONES[colour])
    clear = ~_dilate(apart > FOREGROUND_DISTANCE**2, BESIDE)
    smooth = weight
    for _ in range(SMOOTHINGS):
        smooth = _smoothed(smooth)
    texture = kind_of(smooth, clear)
    camera = "still" if texture in LONG.unmarked else camera_of(smooth, clear, unit)
    return Ground(colour, texture, camera, weight, apart, clear)


def _smoothed(maps: np.ndarray) -> np.ndarray:
    """Maps `[F, H, W]`, each pixel mixed with its neighbours by 1/4, 1/2, 1/4 down and across."""
    wide = np.pad(maps, ((0, 0), (1, 1), (0, 0)), "edge")
    wide = np.pad(0.25 * wide[:, :-2] + 0.5 * wide[:, 1:-1] + 0.25 * wide[:, 2:], ((0, 0), (0, 0), (1, 1)), "edge")
    return 0.25 * wide[:, :, :-2] + 0.5 * wide[:, :, 1:-1] + 0.25 * wide[:, :, 2:]


def kind_of(weight: np.ndarray, clear: np.ndarray) -> str | None:
    """Name the kind of background of smoothed weights, where they are `clear`, both `[F, H, W]`."""
    picked = np.linspace(0, len(weight) - 1, 5).astype(int)
    weight, clear = weight[picked], clear[picked]
    if not clear.any((1, 2)).all():
        return None
    spread = np.sqrt(np.mean([w[c].var() for w, c in zip(weight, clear)]))
    if spread < FLAT:
        return "plain" if weight[clear].mean() < PLAIN_WEIGHT else None
    if spread > SLANTED and np.mean([_off_plane(w, c) for w, c in zip(weight, clear)]) < SLANT_MISS:
        return "shaded"
    down, right = _slopes(weight)
    inside = clear[:, 1:-1, 1:-1]
    slope = (right + 1j * down)[inside]
    size = np.abs(slope) ** 2
    turned = slope / np.maximum(np.abs(slope), 1e-9)
    one, two = (np.abs((size * turned**times).sum()) / size.sum() for times in (2, 4))
    if one > ONE_WAY:
        return "striped"
    return "checkered" if two > TWO_WAYS else "cloudy"


def _off_plane(weight: np.ndarray, clear: np.ndarray) -> float:
    """Spread `[H, W]` of what a plane leaves of the weights."""
    y, x = np.nonzero(clear)
    columns = np.stack([np.ones(len(x)), x, y], 1)
    values = weight[clear]
    return float((values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]).std())


def _slopes(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes down and to the right of maps `[F, H, W]`, without their rims."""
    return (maps[:, 2:, 1:-1] - maps[:, :-2, 1:-1]) / 2, (maps[:, 1:-1, 2:] - maps[:, 1:-1, :-2]) / 2


def camera_of(weight: np.ndarray, clear: np.ndarray, unit: float) -> str | None:
    """Name what the camera does, by where smoothed weights `[F, H, W]` move: least squares of a shift and a growth from each
    frame to the next. Over stripes a shift can be seen across them alone, and only that is sought."""
    down, right = _slopes(weight)
    height, width = down.shape[1:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = (y - (height - 1) / 2) / (64 * unit), (x - (width - 1) / 2) / (64 * unit)
    change = np.diff(weight, axis=0)[:, 1:-1, 1:-1]
    seen = (clear[1:] & clear[:-1])[:, 1:-1, 1:-1]
    slopes = [np.stack([(s[i] + s[i + 1])[seen[i]] / 2 for s in (right, down)], 1) for i in range(len(change))]
    strength, ways = np.linalg.eigh(sum(s.T @ s for s in slopes).astype(np.float64))
    ways = ways[:, strength > ONLY_ACROSS * strength[1]].astype(np.float32)  # [2, 1 or 2] in which there is something to see
    shift, growth = np.zeros(ways.shape[1]), 0.0
    for i, slope in enumerate(slopes):
        place = np.stack([x[seen[i]], y[seen[i]]], 1)
        slope = slope @ ways
        columns = np.concatenate([slope, (slope * (place @ ways)).sum(1, keepdims=True)], 1)
        square = (columns.T @ columns).astype(np.float64)
        square += 1e-6 * np.trace(square) * np.eye(len(square)) + 1e-9 * np.eye(len(square))
        step = np.linalg.solve(square, columns.T @ change[i][seen[i]])
        shift, growth = shift - step[:-1], growth - step[-1]
    return name_camera(*(ways @ shift / unit), growth / (64 * unit))


def name_camera(to_right: float, to_bottom: float, growth: float) -> str | None:
    """Name the camera of a background that moves by so many pixels and grows by so much (logarithm) over the clip."""
    way = np.hypot(to_right, to_bottom)
    if abs(growth) > ZOOMED and way < PANNED:
        return "zoom-in" if growth > 0 else "zoom-out"
    if way > PANNED and abs(growth) < STEADY_ZOOM:
        across, along = abs(to_right), abs(to_bottom)
        if min(across, along) > ASLANT * max(across, along):
            return None
        if across > along:
            return "pan-left" if to_right > 0 else "pan-right"
        return "pan-up" if to_bottom > 0 else "pan-down"
    return "still" if way < NO_PAN and abs(growth) < NO_ZOOM else None
