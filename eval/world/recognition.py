"""Name the shape and the motion of one thing that was followed through the frames.

The shape by its overlap with turned templates, as blurred as the frames are; the motion by path, size and turn.
"""
from __future__ import annotations

from functools import cache

import numpy as np

from .painting import signed_distance

FRAME_OVERLAP, FRAME_SHARE = 0.7, 0.75  # at least so much overlap in so many of the frames: a shape that stays one
EDGE_TO_BLUR = 1 / 1.35  # a Gaussian's sigma by the width between 1/4 and 3/4 of the step that it blurs
BLURS = (0.0, 0.1, 0.2, 0.3)  # of the templates: sigma in radii of gyration
GRID = 40  # samples across the normalised crop that is compared with the templates
GRID_SPAN = 2.0  # half width of that crop in radii of gyration
TURN_STEP = np.deg2rad(4.0)
SYMMETRY = {"circle": None, "ring": None, "square": 90, "cross": 90, "triangle": 120, "star": 72}  # degrees; None: all


def edge_widths(alpha: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """Mean pixels from 1/4 to 3/4 of the colour at the edges of each frame: the area between, by the edge's length."""
    between = ((alpha > 0.25) & (alpha < 0.75)).sum((1, 2))
    steps = sum(np.count_nonzero(np.diff(solid, axis=axis), axis=(1, 2)) for axis in (1, 2))
    return between / np.maximum(1, steps * np.pi / 4)


@cache
def _templates(level: int):
    """Normalised shapes at every turn, blurred by BLURS[level] and cut: names, degrees, coverage `[T, GRID * GRID]`."""
    names, turns, images = [], [], []
    fine = np.linspace(-1.9, 1.9, 192)
    u, v = np.meshgrid(fine, fine)
    for shape, period in SYMMETRY.items():
        gyration = np.sqrt((u * u + v * v)[signed_distance(shape, u, v) < 0].mean())
        sigma = max(BLURS[level] * gyration, 1e-3)
        blur = np.exp(-((fine[:, None] - fine) ** 2) / (2 * sigma**2))
        blur /= blur.sum(1, keepdims=True)
        for turn in np.arange(0, np.deg2rad(period), TURN_STEP) if period else [0.0]:
            ru, rv = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
            full = cut(blur @ (signed_distance(shape, ru, rv) < 0) @ blur.T)
            spread = np.sqrt((full * (u * u + v * v)).sum() / full.sum())
            line = ((np.arange(4 * GRID) + 0.5) / (4 * GRID) * 2 - 1) * GRID_SPAN * spread
            at = np.round((line - fine[0]) / (fine[1] - fine[0])).astype(int)
            sampled = np.pad(full, 1)[np.clip(at + 1, 0, 193)[:, None], np.clip(at + 1, 0, 193)]
            names.append(shape)
            turns.append(turn)
            images.append(sampled.reshape(GRID, 4, GRID, 4).mean((1, 3)).ravel())
    return np.array(names), np.array(turns), np.array(images, np.float32)


def cut(alpha: np.ndarray) -> np.ndarray:
    """Full from 3/4 on and empty up to 1/4: an edge keeps its place, and what shines through weakly is gone."""
    return np.clip(2 * alpha - 0.5, 0, 1)


def shape_of(alpha, x, y, spread, edges):
    """Best shape (None if too many frames show another), its mean overlap over the frames, and its turn in every frame
    (radians, within its symmetry).

    The templates are as blurred as the frames (`edges`: width per frame, in pixels); a sharper frame counts more."""
    blur = EDGE_TO_BLUR * np.median(edges) / np.median(spread)
    names, turns, images = _templates(int(np.argmin(np.abs(np.array(BLURS) - blur))))
    weight = 1 / np.maximum(edges, 0.5) ** 2
    weight /= weight.sum()
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
    shape = max(best_of, key=lambda s: best_of[s] @ weight)
    turn = turns[names == shape][overlap[:, names == shape].argmax(1)]
    steady = weight[best_of[shape] > FRAME_OVERLAP].sum() > FRAME_SHARE
    return shape if steady else None, float(best_of[shape] @ weight), _unwrap(turn, SYMMETRY[shape])


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


def motion_of(x: np.ndarray, y: np.ndarray, size: np.ndarray, turn: np.ndarray) -> str | None:
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
