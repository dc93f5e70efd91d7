"""Paint a plan, anti-aliased: shapes by their signed distance over textured backgrounds.

Works on any array namespace with NumPy's names, so that NumPy paints for tests and PyTorch for training.
"""
from __future__ import annotations

from math import cos, pi, sin

import numpy as np

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


def render(what: Plan, height: int = HEIGHT, width: int = WIDTH, xp=np):
    """Paint a plan whose arrays belong to `xp`: anti-aliased frames `[B, F, H, W, 3]`, floats 0..255."""
    ground = backgrounds(what.tone, what.texture, height, width, xp)
    video = xp.stack([ground] * what.x.shape[1], 1)
    px, py = (_arange(xp, n, what.tone) + 0.5 for n in (width, height))
    for number, name in enumerate(SHAPES):
        rows = [i for i, s in enumerate(np.asarray(what.shape)) if s == number]
        if not rows:
            continue
        x, y, radius, angle = (part[rows][:, :, None, None] for part in (what.x, what.y, what.radius, what.angle))
        dx, dy = (px[None, None, None, :] - x) / radius, (py[None, None, :, None] - y) / radius
        u, v = xp.cos(angle) * dx + xp.sin(angle) * dy, xp.cos(angle) * dy - xp.sin(angle) * dx
        alpha = xp.clip(0.5 - signed_distance(name, u, v, xp) * radius, 0, 1)
        for k, row in enumerate(rows):
            clip = int(what.clip[row])
            video[clip] = video[clip] + alpha[k][..., None] * (what.rgb[row] - video[clip])
    return video
