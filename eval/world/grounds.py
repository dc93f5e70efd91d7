"""The long world's backgrounds: textures that fill the plane, and the camera that passes over them.

A texture is a function of a point of the plane; a camera says which point a pixel shows. Lengths are in pixels of a frame 128
high. Works on NumPy's and PyTorch's arrays alike.
"""
from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .scene import HEIGHT, LONG, Meaning

PAN = (38.0, 54.0)  # how far the background moves over the whole clip
ZOOM = (1.4, 1.65)  # how much larger or smaller it gets
PERIOD = {"striped": (22.0, 34.0), "checkered": (26.0, 40.0)}  # of both tones together
TILT = 20.0  # degrees: stripes and checks that a camera passes over lie at most so far from the axes
EDGE = 0.75  # pixels over which one tone goes over into the other
WAVES = 40  # of which a cloudy background is the sum
WAVE_PERIODS = (14.0, 90.0)
CLOUD_CONTRAST = 0.42


@dataclass(frozen=True)
class Ground:
    """The backgrounds of B clips of F frames.

    texture [B] int (always NumPy's) and tone [B, 2, 3]; angle [B] in radians, period [B] and phase [B, 2] place the texture on
    the plane; the point of the plane in the middle of a frame is x, y [B, F], and a pixel is 1 / zoom [B, F] of the plane's.
    """

    texture: np.ndarray
    tone: np.ndarray
    angle: np.ndarray
    period: np.ndarray
    phase: np.ndarray
    x: np.ndarray
    y: np.ndarray
    zoom: np.ndarray

    def take(self, index) -> Ground:
        """The backgrounds of the clips in `index`, in that order."""
        return Ground(*(getattr(self, f.name)[index] for f in fields(self)))


def _turn(texture: str, camera: str, rng: np.random.Generator) -> float:
    """Degrees by which a texture is turned: stripes that a camera pans over lie across its way, or they would hide it."""
    if texture == "striped" and not camera.startswith("pan"):
        return rng.uniform(0, 180)
    if texture in ("striped", "checkered"):
        return rng.uniform(-TILT, TILT) + (90 if texture == "striped" and camera in ("pan-up", "pan-down") else 0)
    return rng.uniform(0, 360)


def plan_grounds(meanings: list[Meaning], tone: np.ndarray, rng: np.random.Generator, t: np.ndarray) -> Ground:
    """Draw how each background lies and how its camera goes over the times `t` `[F]` in 0..1; tone `[B, 2, 3]`."""
    names = list(LONG.textures)
    rows = []
    for meaning in meanings:
        camera, far = meaning.camera or "still", rng.uniform(*PAN)
        period = rng.uniform(*PERIOD.get(meaning.texture, (1, 1)))
        step = {"pan-left": (-far, 0), "pan-right": (far, 0), "pan-up": (0, -far), "pan-down": (0, far)}.get(camera, (0, 0))
        ends = {"zoom-in": 1, "zoom-out": -1}.get(camera, 0) * np.log(rng.uniform(*ZOOM))
        rows.append((names.index(meaning.texture), np.deg2rad(_turn(meaning.texture, camera, rng)), period,
                     rng.uniform(0, 1000, 2), step[0] * (t - 0.5), step[1] * (t - 0.5), np.exp(ends * (t - 0.5))))
    texture, angle, period, phase, x, y, zoom = (np.array(part) for part in zip(*rows))
    return Ground(texture, tone, *(part.astype(np.float32) for part in (angle, period, phase, x, y, zoom)))


def waves() -> np.ndarray:
    """The waves of a cloudy background, `[WAVES, 4]`: frequency along x and y (radians a pixel), height, phase."""
    rng = np.random.default_rng(20)
    period = np.exp(rng.uniform(*np.log(WAVE_PERIODS), WAVES))
    way, height = rng.uniform(0, np.pi, WAVES), period**0.5
    return np.stack([2 * np.pi / period * np.cos(way), 2 * np.pi / period * np.sin(way),
                     height / np.sqrt((height**2).sum() / 2), rng.uniform(0, 2 * np.pi, WAVES)], 1)


def _stripes(u, period, unit, xp):
    """0 and 1 by turns along `u`, half a `period` each; the edge between them is EDGE pixels wide. `unit`: pixels a length."""
    wave = abs(u / period % 1 - 0.5) - 0.25  # -1/4..1/4, zero at the edges
    return xp.clip(0.5 + wave * period * (unit / EDGE), 0, 1)


def _cloud(ground: Ground, x, y, xp):
    """A sum of plane waves, cut to 0..1, `[B, F, H, W]`: a matrix product of sines along x `[B, F, W]` and y `[B, F, H]`."""
    wave = waves()
    kx, ky, height, start = (xp.asarray(part, dtype=x.dtype) for part in wave.T) if xp is np else (
        xp.as_tensor(part, dtype=x.dtype, device=x.device) for part in wave.T)
    cos, sin = xp.cos(ground.angle)[:, None], xp.sin(ground.angle)[:, None]
    ax, ay = cos * kx - sin * ky, sin * kx + cos * ky  # [B, K]
    at = (ground.phase[:, :1] * ax + ground.phase[:, 1:] * ay + start)[:, None, None]
    a, b = x[..., None] * ax[:, None, None] + at, y[..., None] * ay[:, None, None]  # [B, F, W, K], [B, F, H, K]
    rows = xp.concatenate([xp.cos(b), xp.sin(b)], -1) if xp is np else xp.cat([xp.cos(b), xp.sin(b)], -1)
    columns = (height * xp.sin(a), height * xp.cos(a))
    columns = xp.concatenate(columns, -1) if xp is np else xp.cat(columns, -1)
    return xp.clip(0.5 + CLOUD_CONTRAST * (rows @ columns.swapaxes(-1, -2)), 0, 1)


def _weight(name: str, ground: Ground, x, y, unit, width: float, xp):
    """Weight of the second tone, 0..1, `[B, F, H, W]`, of backgrounds of one texture."""
    if name == "cloudy":
        return _cloud(ground, x, y, xp)
    x, y = x[:, :, None], y[..., None]
    cos, sin, period = (part[:, None, None, None] for part in (xp.cos(ground.angle), xp.sin(ground.angle), ground.period))
    if name == "plain":
        return 0 * x + 0 * y
    if name == "shaded":  # from one corner or side of the frame to the other
        reach = abs(cos) * width / 2 + abs(sin) * HEIGHT / 2
        return 0.5 + (cos * x + sin * y) / (2 * reach)
    first, second = (part[:, None, None, None] for part in (ground.phase[:, 0], ground.phase[:, 1]))
    unit = unit[..., None, None]
    along = _stripes(cos * x + sin * y + first, period, unit, xp)
    if name == "striped":
        return along
    across = _stripes(cos * y - sin * x + second, period, unit, xp)
    return along + across - 2 * along * across


def paint_grounds(ground: Ground, height: int, width: int, xp=np):
    """Paint backgrounds whose arrays belong to `xp`: `[B, F, H, W, 3]`, floats 0..255."""
    unit = height / HEIGHT
    px, py = (_middle_out(xp, n, ground.zoom) / unit for n in (width, height))
    x = ground.x[..., None] + px / ground.zoom[..., None]  # [B, F, W]
    y = ground.y[..., None] + py / ground.zoom[..., None]
    empty = (*ground.zoom.shape, height, width)
    weight = np.empty(empty, np.float32) if xp is np else xp.empty(empty, device=x.device)
    for number, name in enumerate(LONG.textures):
        rows = np.flatnonzero(ground.texture == number)
        if len(rows):
            weight[rows] = _weight(name, ground.take(rows), x[rows], y[rows], unit * ground.zoom[rows], width / unit, xp)
    tone = ground.tone[:, None, None, None]
    return tone[..., 0, :] + weight[..., None] * (tone[..., 1, :] - tone[..., 0, :])


def _middle_out(xp, count: int, like):
    """Pixel centres counted from the middle, `[count]`."""
    steps = np.arange(count, dtype=np.float32) if xp is np else xp.arange(count, device=like.device, dtype=like.dtype)
    return steps + 0.5 - count / 2
