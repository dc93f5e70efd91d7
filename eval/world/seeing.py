"""What frames show, in the world's terms: the background, and the colours, shapes and motions of what stands out from it.

From the frames alone: find the background among the world's colours and textures, what stands out from it and its colour,
and follow each colour through the frames; `recognition` names the shape and the motion of what was followed. A slightly
blurred video, as an autoencoder makes it, reads as the sharp one does: an edge between two colours is no third thing. A smear
has a colour and a motion, but no shape. NumPy only.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .painting import texture_weight
from .recognition import cut, edge_widths, motion_of, shape_of
from .scene import COLOURS, HEIGHT, TEXTURES, tones

FOREGROUND_DISTANCE = 48.0  # RGB distance from the background at which a pixel belongs to a shape
BACKGROUND_TOLERANCE = 45.0
BACKGROUND_SHARE = 0.55  # of all pixels that must agree with the background found
MIN_PRESENCE = 0.8  # share of the frames in which a shape must be seen
MIN_OVERLAP = 0.76  # intersection over union with the best template
STANDS_OUT = 70.0  # mean RGB distance from the background of a colour that counts; the world keeps at least 100
COLOUR_MISS = 70.0  # RGB distance from the line between the background and a colour at which a pixel is neither
EDGE_WIDTH = 5  # pixels of a 128-high frame beside a shape within which a mixture of its colour and the ground is its edge
EDGE_MISS = 45.0  # RGB distance from the line between the two at which it is a mixture no more
EDGE_REACH = 10  # pixels of a 128-high frame around a shape in which its edges are looked for
MAX_EDGE = 4.5  # pixels of a 128-high frame between 1/4 and 3/4 of the colour; wider, a shape is a smear
LEAST_AREA = 60.0  # pixels of a 128-high frame that a thing covers at least
EXTRA_SHARE = 0.12  # of the largest area: what a second one of the same colour must have at least
EXTRA_PRESENCE = 0.5  # share of the frames in which a second area of the same colour makes a second thing


@dataclass(frozen=True)
class Seen:
    """One shape as found in the frames."""

    colour: str
    shape: str | None
    motion: str | None
    overlap: float
    edge: float  # width of its edges in pixels


@dataclass(frozen=True)
class Scene:
    """What the frames show: shapes from left to right, the background (None where nothing fits), and what the camera does
    (of a long clip; None where it is unclear)."""

    things: tuple[Seen, ...]
    texture: str | None
    background: str | None
    camera: str | None = None

    def __str__(self) -> str:
        things = " and ".join(f"{t.colour} {t.shape or 'something'} ({t.motion or 'motion unclear'})" for t in self.things)
        ground = f"{self.texture} {self.background} background" if self.background else "no clear background"
        return f"{things or 'no shape'} on {ground}" + (f", camera {self.camera}" if self.camera else "")


def look(frames: np.ndarray) -> Scene:
    """Describe the frames (uint8 `[F, H, W, 3]`) in the world's terms, without knowing any caption."""
    frames = check_frames(frames)
    video = np.ascontiguousarray(frames.transpose(3, 0, 1, 2), np.float32)
    texture, background, ground = _background(video)
    if background is None:
        return Scene((), None, None)
    unit = frames.shape[1] / HEIGHT
    window = _window(video, ground)
    if window is None:
        return Scene((), texture, background)
    offset, ground = video[:, :, window[0], window[1]] - ground[:, None, window[0], window[1]], ground[:, window[0], window[1]]
    found = []
    edge = max(2, round(EDGE_WIDTH * unit))
    colours = _colours(offset, ground, edge)
    for colour, rgb, core in colours:
        others = [c for c in colours if c[2] is not core]
        found += _things(colour, _coverage(offset, ground, rgb, core, others, edge), core, unit)
    found.sort(key=lambda pair: pair[0])
    return Scene(tuple(seen for _, seen in found), texture, background)


def check_frames(frames: np.ndarray) -> np.ndarray:
    """The frames as an array. ValueError for what is no uint8 `[F, H, W, 3]`, or has too few frames or pixels to be judged."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 [frames, height, width, 3]")
    if frames.shape[0] < 5 or min(frames.shape[1:3]) < 32:
        raise ValueError(f"frames are {frames.shape}: at least 5 frames of 32 x 32 are needed to judge a motion")
    return frames


def _square(vectors: np.ndarray) -> np.ndarray:
    """Squared length over the first axis, `[3, ...]` -> `[...]`."""
    return vectors[0] * vectors[0] + vectors[1] * vectors[1] + vectors[2] * vectors[2]


@lru_cache(maxsize=4)
def _weights(height: int, width: int) -> np.ndarray:
    """Weight of the second tone of every texture, `[4, H, W]` float32."""
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    return np.stack([texture_weight(t, x, y, height / HEIGHT) for t in TEXTURES]).astype(np.float32)


def _background(video: np.ndarray):
    """The world's background nearest to most pixels of `[3, F, H, W]`, its tones then taken from the video: texture,
    colour, `[3, H, W]`; None, None, None where too few pixels agree with any."""
    height, width = video.shape[2:]
    weights = _weights(height, width)
    step = max(1, height // 64)
    picked = video[:, np.linspace(0, video.shape[1] - 1, 5).astype(int), step // 2::step, step // 2::step]
    part = weights[:, step // 2::step, step // 2::step].reshape(len(weights), -1)
    both = np.concatenate([1 - part, part], 1).T  # [2 P, 4]
    names = list(COLOURS)
    palette = np.array([tones(c) for c in names], np.float32)  # [10, 2, 3]
    distance = np.sqrt(((picked.reshape(3, 1, 1, -1) - palette.transpose(2, 0, 1)[..., None]) ** 2).sum(0))
    distance = distance.reshape(len(names), 2, 5, -1)
    error = np.minimum(distance, 1.4 * BACKGROUND_TOLERANCE).mean(2).reshape(len(names), -1) @ both
    share = (distance < BACKGROUND_TOLERANCE).mean(2, dtype=np.float32).reshape(len(names), -1) @ both / part.shape[1]
    best = np.unravel_index(int(np.argmin(error)), error.shape)
    if share[best] < BACKGROUND_SHARE:
        return None, None, None
    weight, tone = weights[best[1]], palette[best[0]].copy()
    picked = video[:, :: max(1, video.shape[1] // 8), ::2, ::2]
    coarse = weight[::2, ::2]
    for i, region in enumerate((coarse < 0.1, coarse > 0.9)):
        inside = picked[:, :, region].reshape(3, -1)
        inside = inside[:, _square(inside - tone[i][:, None]) < BACKGROUND_TOLERANCE**2]
        if inside.shape[1] > 50:
            tone[i] = np.median(inside, axis=1)
    ground = tone[0][:, None, None] + weight * (tone[1] - tone[0])[:, None, None]
    return TEXTURES[best[1]], names[best[0]], ground


def _window(video: np.ndarray, ground: np.ndarray):
    """Rows and columns outside which nothing stands out, as two slices; None if nothing does anywhere."""
    apart = _square(video[:, :, ::2, ::2] - ground[:, None, ::2, ::2]) > FOREGROUND_DISTANCE**2
    slices = []
    for axis, size in ((2, ground.shape[1]), (1, ground.shape[2])):
        lines = np.flatnonzero(apart.sum((0, axis)) >= 2)
        if not len(lines):
            return None
        slices.append(slice(max(0, 2 * lines[0] - 6), min(size, 2 * lines[-1] + 8)))
    return slices


def _shifts(mask: np.ndarray):
    """The mask moved by one pixel each way, False coming in from outside."""
    for axis in (1, 2):
        for shift in (1, -1):
            moved = np.zeros_like(mask)
            to, of = [slice(None)] * 3, [slice(None)] * 3
            to[axis], of[axis] = (slice(1, None), slice(None, -1)) if shift == 1 else (slice(None, -1), slice(1, None))
            moved[tuple(to)] = mask[tuple(of)]
            yield moved


def _erode(mask: np.ndarray, times: int = 1) -> np.ndarray:
    for _ in range(times):
        inner = mask.copy()
        for moved in _shifts(mask):
            inner &= moved
        mask = inner
    return mask


def _dilate(mask: np.ndarray, times: int = 1) -> np.ndarray:
    for _ in range(times):
        outer = mask.copy()
        for moved in _shifts(mask):
            outer |= moved
        mask = outer
    return mask


def _colours(offset: np.ndarray, ground: np.ndarray, edge: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The world's colours that fill the inside of what stands out, most frequent first: name, mean RGB, where `[F, H, W]`.

    A colour seen only where another one fades into the background is that one's edge, and no colour of its own.
    """
    mask = _square(offset) > FOREGROUND_DISTANCE**2
    least = 3 * len(mask)
    once = _erode(mask)
    core = _erode(once)
    if core.sum() < least:
        core = once
    where = np.nonzero(core)
    if len(where[0]) < least:
        return []
    away = offset[:, where[0], where[1], where[2]]
    pixels = away + ground[:, where[1], where[2]]
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
    nearest = np.argmin([_square(pixels - colour[:, None]) for colour in palette], axis=0)
    counts = np.bincount(nearest, minlength=len(names))
    found = []
    for i in np.argsort(-counts):
        if counts[i] < max(least, 0.1 * len(nearest)):
            break
        own = nearest == i
        rgb, contrast = pixels[:, own].mean(1), np.sqrt(_square(away[:, own])).mean()
        if contrast < STANDS_OUT:
            continue
        place = np.zeros_like(mask)
        place[tuple(axis[own] for axis in where)] = True
        for _, stronger, beside in found:
            alpha, miss = _mix(offset, ground, stronger)
            place &= ~(_dilate(beside, edge) & (miss < EDGE_MISS**2) & (alpha > 0.15))
        if place.sum() >= max(least, 0.1 * len(nearest)):
            found.append((names[i], rgb, place))
    return [a for a in found if not any(_is_halo(offset, ground, a[2], b, 3 * edge) for b in found if b is not a)]


def _is_halo(offset, ground, place: np.ndarray, other, reach: int) -> bool:
    """True if `place` lies all around another colour and mixes it with the background: a smear of that one."""
    _, rgb, inner = other
    alpha, miss = _mix(offset, ground, rgb)
    mixed = place & (miss < COLOUR_MISS**2) & (alpha < 0.9) & _dilate(inner, reach)
    if mixed.sum() < 0.7 * place.sum():
        return False
    around = np.ones(len(place), bool)
    for axis in (1, 2):
        outside, inside = place.any(axis), inner.any(axis)
        around &= (outside.argmax(1) < inside.argmax(1)) & (outside[:, ::-1].argmax(1) < inside[:, ::-1].argmax(1))
    return bool(around.mean() > 0.5)


def _mix(offset: np.ndarray, ground: np.ndarray, rgb: np.ndarray):
    """How far each pixel lies on the way from the background to `rgb`, 0..1, and how far off that way (squared)."""
    way = rgb[:, None, None] - ground
    along = (offset * way[:, None]).sum(0)
    alpha = np.clip(along / _square(way), 0, 1)
    return alpha, _square(offset - alpha * way[:, None])


def _coverage(offset, ground, rgb, core, others, edge) -> np.ndarray:
    """Share of `rgb` in each pixel, 0..1 `[F, H, W]`; 0 where it is another colour, or the edge of one."""
    alpha, miss = _mix(offset, ground, rgb)
    alpha = np.where(miss < COLOUR_MISS**2, alpha, 0)
    near = _dilate(core, edge) if others else None
    for _, other, place in others:
        other_alpha, other_miss = _mix(offset, ground, other)
        better = (other_miss < miss) & (other_alpha > 0.25)
        alpha[(better | _dilate(place, edge)) & ~near] = 0
    return alpha


def _areas(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected areas (by sides) of every frame: number of each pixel `[F, H, W]`, -1 outside, and the areas' pixel counts.

    Numbers are unique over all frames."""
    count, height, width = mask.shape
    padded = np.zeros((count * height, width + 2), np.int8)
    padded[:, 1:-1] = mask.reshape(-1, width)
    edges = np.diff(padded, axis=1)
    line, start = np.nonzero(edges == 1)
    stop = np.nonzero(edges == -1)[1]
    root = list(range(len(line)))

    def find(i):
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    first = np.searchsorted(line, np.arange(count * height + 1)).tolist()
    starts, stops = start.tolist(), stop.tolist()  # lists: single values of an array take three times as long
    for row in np.unique(line[line % height > 0]).tolist():
        above, here = first[row - 1], first[row]
        while above < first[row] and here < first[row + 1]:
            if starts[above] < stops[here] and starts[here] < stops[above]:
                root[find(here)] = find(above)
            if stops[above] < stops[here]:
                above += 1
            else:
                here += 1
    _, number = np.unique([find(i) for i in root], return_inverse=True)
    labels = np.full(count * height * width, -1)
    at = np.repeat(line * width + start - np.cumsum(stop - start) + (stop - start), stop - start)
    labels[at + np.arange(len(at))] = np.repeat(number, stop - start)
    return labels.reshape(mask.shape), np.bincount(number, stop - start)


def largest_areas(solid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The largest connected area of each frame of a mask `[F, H, W]`: a mask of these areas, their sizes and those of the next
    largest, `[F]`, 0 where there is none; None for an empty mask."""
    labels, sizes = _areas(solid)
    if not len(sizes):
        return None
    frame = np.empty(len(sizes), int)
    inside = np.nonzero(solid)
    frame[labels[inside]] = inside[0]
    largest = np.full(len(solid), -1)
    order = np.argsort(sizes, kind="stable")
    largest[frame[order]] = order
    rest = np.where(np.arange(len(sizes)) == largest[frame], 0, sizes)
    second = np.zeros(len(solid))
    np.maximum.at(second, frame, rest)
    return solid & (labels == largest[:, None, None]), np.where(largest >= 0, sizes[largest], 0), second


def moments(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Middle x and y, radius of gyration and area of coverages `[F, H, W]`."""
    ys, xs = np.arange(kept.shape[1], dtype=np.float32), np.arange(kept.shape[2], dtype=np.float32)
    area = kept.sum((1, 2))
    x, y = (kept.sum(1) @ xs) / area, (kept.sum(2) @ ys) / area
    variance = (kept.sum(1) @ xs**2 + kept.sum(2) @ ys**2) / area - x**2 - y**2
    return x, y, np.sqrt(np.maximum(variance, 1)), area


def _things(colour: str, alpha: np.ndarray, core: np.ndarray, unit: float) -> list[tuple[float, Seen]]:
    """Follow one colour through the frames: (mean x, Seen) of its largest connected area, and of what else has its colour."""
    areas = largest_areas(alpha > 0.5)
    if areas is None:
        return []
    main, first, second = areas
    extra = (second > LEAST_AREA * unit**2) & (second > EXTRA_SHARE * first)
    present = (first > LEAST_AREA * unit**2) & (core & main).any((1, 2))
    if present.mean() < MIN_PRESENCE:
        return []
    edges = edge_widths(np.where(_dilate(main, max(3, round(EDGE_REACH * unit))), alpha, 0)[present], main[present])
    kept = np.where(_dilate(main, 2), cut(alpha), 0)[present]
    x, y, spread, area = moments(kept)
    shape, overlap, turn = shape_of(kept, x, y, spread, edges)
    motion = motion_of(x / unit, y / unit, np.sqrt(area), turn)
    width = float(np.median(edges))
    clear = overlap >= MIN_OVERLAP and width < MAX_EDGE * unit
    found = [(float(x.mean()), Seen(colour, shape if clear else None, motion, overlap, width))]
    if extra.mean() >= EXTRA_PRESENCE:
        found.append((float(x.mean()), Seen(colour, None, None, 0.0, 0.0)))
    return found
