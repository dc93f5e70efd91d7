"""Paint a plan, anti-aliased: shapes by their signed distance over textured backgrounds.

Works on any array namespace with NumPy's names, so that NumPy paints for tests and PyTorch for training.
"""
from __future__ import annotations

from math import cos, pi, sin

import numpy as np

from .grounds import paint_grounds
from .motion import Plan
from .scene import HEIGHT, SHAPES, TEXTURES, WIDTH


def signed_distance(shape: str, u, v, xp=np):
    """Distance to the edge of a shape of radius 1 at the origin (y down), negative inside, near enough to 1 px for edges."""
    if shape == "circle":
        return xp.sqrt(u * u + v * v) - 0.95
    if shape == "ring":
        return abs(xp.sqrt(u * u + v * v) - 0.72) - 0.25
    if shape == "square":
        return xp.maximum(abs(u), abs(v)) - 0.84
    if shape == "triangle":
        return xp.maximum(v - 0.56, 0.8660254 * abs(u) - 0.5 * v - 0.56)
    if shape == "cross":
        a, b = abs(u), abs(v)
        return xp.minimum(xp.maximum(a - 1.0, b - 0.35), xp.maximum(a - 0.35, b - 1.0))
    if shape == "star":
        outer, inner = 1.15, 0.52
        tip = np.array([outer, 0.0])
        notch = inner * np.array([cos(pi / 5), sin(pi / 5)])
        edge = (notch - tip) / np.linalg.norm(notch - tip)
        fold = abs((xp.arctan2(v, u) + pi / 2 + pi / 5) % (2 * pi / 5) - pi / 5)
        rho = xp.sqrt(u * u + v * v)
        return (rho * xp.cos(fold) - outer) * float(edge[1]) - rho * xp.sin(fold) * float(edge[0])
    raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")


def texture_weight(texture: str, x, y, unit: float, xp=np):
    """Weight of the second tone, 0..1, at pixel centres x `[W]`, y `[H]`; `unit` = height / 128. Returns `[H, W]`."""
    x, y = (x / unit)[None, :], (y / unit)[:, None]
    if texture == "striped":
        return xp.floor(x / 16) % 2 + 0 * y
    if texture == "checkered":
        return (xp.floor(x / 16) + xp.floor(y / 16)) % 2
    if texture == "dotted":
        return xp.clip((8.0 - xp.sqrt((x % 32 - 16) ** 2 + (y % 32 - 16) ** 2)) * unit + 0.5, 0, 1)
    return 0 * x + 0 * y


def backgrounds(tone, texture, height: int, width: int, xp=np, like=None):
    """Paint backgrounds: tone `[B, 2, 3]`, texture `[B]` -> `[B, H, W, 3]`."""
    like = tone if like is None else like
    x, y = (_arange(xp, n, like) + 0.5 for n in (width, height))
    weight = xp.stack([texture_weight(name, x, y, height / HEIGHT, xp) for name in TEXTURES])[texture]
    return tone[:, None, None, 0] + weight[..., None] * (tone[:, 1] - tone[:, 0])[:, None, None]


def _arange(xp, count: int, like):
    return xp.arange(count) * 1.0 if xp is np else xp.arange(count, device=like.device, dtype=like.dtype)


def paint_ground(what: Plan, height: int, width: int, xp=np):
    """The backgrounds of a plan whose arrays belong to `xp`, without its shapes: `[B, F, H, W, 3]`, floats 0..255."""
    if what.ground is not None:
        return paint_grounds(what.ground, height, width, xp)
    return xp.stack([backgrounds(what.tone, what.texture, height, width, xp)] * what.x.shape[1], 1)


def render(what: Plan, height: int = HEIGHT, width: int = WIDTH, xp=np, ground=None):
    """Paint a plan whose arrays belong to `xp`: anti-aliased frames `[B, F, H, W, 3]`, floats 0..255.

    `ground`: what `paint_ground` gave for this plan, where it is at hand; it is painted over."""
    video = paint_ground(what, height, width, xp) if ground is None else ground
    px, py = (_arange(xp, n, what.tone) + 0.5 for n in (width, height))
    windows = xp is np and what.ground is not None  # large clips: only where a shape is, and half the memory
    if windows:
        px, py = px.astype(np.float32), py.astype(np.float32)
    clips = np.asarray(what.clip)
    depth = np.arange(len(clips)) - np.searchsorted(clips, clips)  # of each shape, 0 behind
    for layer in range(depth.max() + 1):
        for number, name in enumerate(SHAPES):
            rows = np.flatnonzero((np.asarray(what.shape) == number) & (depth == layer))
            for part in rows[:, None] if windows else [rows] if len(rows) else []:
                box = _window(what, part[0], height, width) if windows else (slice(None), slice(None))
                x, y, radius, angle = (a[part][:, :, None, None] for a in (what.x, what.y, what.radius, what.angle))
                dx, dy = (px[None, None, None, box[1]] - x) / radius, (py[None, None, box[0], None] - y) / radius
                u, v = xp.cos(angle) * dx + xp.sin(angle) * dy, xp.cos(angle) * dy - xp.sin(angle) * dx
                alpha = xp.clip(0.5 - signed_distance(name, u, v, xp) * radius, 0, 1)
                for k, row in enumerate(part):
                    clip = video[int(what.clip[row])][:, box[0], box[1]]
                    clip[:] = clip + alpha[k][..., None] * (what.rgb[row] - clip)
    return video


def _window(what: Plan, row: int, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns outside which a shape shows in no frame."""
    return tuple(slice(max(0, int((at[row] - 1.2 * what.radius[row]).min()) - 1),
                       max(0, min(size, int((at[row] + 1.2 * what.radius[row]).max()) + 2)))
                 for at, size in ((what.y, height), (what.x, width)))
