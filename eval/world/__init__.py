"""The small world that the shipped CogVideoX knows: what a caption can mean, how it is said, what it looks like.

One or two plain shapes on a plain or textured background. A `Meaning` says what is in a clip, `caption_of` puts it into
English in many ways, `parse` reads such English back, `plan` draws positions and speeds, and `render` paints the frames.
`render` works on any array namespace with NumPy's names, so that NumPy paints for tests and PyTorch for training.
"""
from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from math import cos, pi, sin

import numpy as np

# RGB, 0..255; every pair is at least 80 apart, so that a blurred colour is still read right.
COLOURS = {
    "red": (222, 36, 40), "orange": (244, 140, 28), "yellow": (246, 226, 54), "green": (36, 158, 62),
    "cyan": (66, 208, 214), "blue": (36, 66, 214), "purple": (132, 44, 176), "pink": (250, 138, 190),
    "white": (242, 242, 242), "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered", "dotted")
DIRECTIONS = {  # unit steps, x to the right, y down
    "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
    "up-left": (-1, -1), "up-right": (1, -1), "down-left": (-1, 1), "down-right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "still", "spin", "grow", "shrink", "bounce-sideways", "bounce-up-down")
PAIR_MOTIONS = ("left", "right", "up", "down", "still", "spin", "grow", "shrink")  # a pair shares the frame: short ways only
SIZES = {"small": 15.0, "": 21.0, "large": 28.0}  # radius in pixels of a 128-pixel-high frame; "" is said by no word
ROUND = ("circle", "ring")  # turning does not show on these

HEIGHT, WIDTH, FRAMES, FPS = 128, 192, 33, 8
MIN_CONTRAST = 100.0  # RGB distance between a shape and both tones of its background
HELD_OUT_ONE_IN = 16
SPIN_DEGREES = 225.0
GROW_RADII = (12.0, 29.0)
PAIR_GROW_RADII = (12.0, 25.0)

_SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"), "square": ("square", "box"), "triangle": ("triangle",), "star": ("star",),
    "ring": ("ring", "hoop"), "cross": ("cross", "plus sign"),
}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "": ("",), "large": ("large", "big", "huge")}
_TEXTURE_WORDS = {
    "plain": ("", "plain", "solid"), "striped": ("striped",), "checkered": ("checkered", "chequered"),
    "dotted": ("dotted", "spotted"),
}
_VERBS = ("moves", "slides", "drifts", "glides", "is moving", "travels")
_MOTION_WORDS = {
    "left": ("{v} left", "{v} to the left", "{v} from right to left"),
    "right": ("{v} right", "{v} to the right", "{v} from left to right"),
    "up": ("{v} up", "{v} upwards", "rises"),
    "down": ("{v} down", "{v} downwards", "sinks"),
    "up-left": ("{v} up and to the left", "{v} diagonally up-left", "{v} towards the upper left"),
    "up-right": ("{v} up and to the right", "{v} diagonally up-right", "{v} towards the upper right"),
    "down-left": ("{v} down and to the left", "{v} diagonally down-left", "{v} towards the lower left"),
    "down-right": ("{v} down and to the right", "{v} diagonally down-right", "{v} towards the lower right"),
    "still": ("stands still", "stays still", "does not move", "rests"),
    "spin": ("spins", "rotates", "turns around", "is spinning"),
    "grow": ("grows", "gets bigger", "expands", "is growing"),
    "shrink": ("shrinks", "gets smaller", "is shrinking"),
    "bounce-sideways": ("bounces left and right", "bounces from side to side"),
    "bounce-up-down": ("bounces up and down", "is bouncing up and down"),
}
_OPENINGS = ("", "", "", "", "a video of ", "a clip of ")
_PREPOSITIONS = ("on", "over", "against", "in front of")


@dataclass(frozen=True)
class Thing:
    """One shape and what it does. A field is None where a caption leaves it open."""

    colour: str | None
    shape: str | None
    motion: str | None
    size: str = ""


@dataclass(frozen=True)
class Meaning:
    """What a clip shows: one or two things, from left to right, and the background."""

    things: tuple[Thing, ...]
    texture: str | None
    background: str | None
    unknown: tuple[str, ...] = field(default=(), compare=False)  # words of the caption that the world has no use for

    @property
    def complete(self) -> bool:
        """True if every part is stated in the world's own terms."""
        parts = [self.texture, self.background] + [p for t in self.things for p in (t.colour, t.shape, t.motion)]
        return bool(self.things) and None not in parts


def tones(colour: str) -> np.ndarray:
    """The two tones, `[2, 3]` float32 in 0..255, that a texture of this colour is made of (plain uses the first)."""
    base = np.array(COLOURS[colour], np.float32)
    dark = base.mean() < 120
    return np.stack([base, base * 0.74 + 255 * 0.26 if dark else base * 0.76]).astype(np.float32)


def contrast(first: str, second: str) -> float:
    """RGB distance between a shape's colour and the nearer tone of a background."""
    return float(np.linalg.norm(tones(second) - np.array(COLOURS[first], np.float32), axis=1).min())


def held_out(meaning: Meaning) -> bool:
    """True for the combinations that training never sees: a fixed hash of each thing with its background, one in 16."""
    return any(
        zlib.crc32(f"{t.shape}|{t.colour}|{t.motion}|{meaning.texture}|{meaning.background}".encode()) % HELD_OUT_ONE_IN == 0
        for t in meaning.things
    )


def draw_meaning(rng: np.random.Generator, pair_share: float = 0.2) -> Meaning:
    """A random meaning; every part uniform, subject to contrast; `pair_share` of them hold two shapes."""
    names = list(COLOURS)
    pair = rng.random() < pair_share
    while True:
        background = names[rng.integers(len(names))]
        texture = TEXTURES[rng.integers(len(TEXTURES))]
        things = []
        for _ in range(2 if pair else 1):
            motions = PAIR_MOTIONS if pair else MOTIONS
            motion = motions[rng.integers(len(motions))]
            shapes = [s for s in SHAPES if s not in ROUND] if motion == "spin" else SHAPES
            sizes = ("",) if motion in ("grow", "shrink") else (("small", "") if pair else tuple(SIZES))
            things.append(Thing(names[rng.integers(len(names))], shapes[rng.integers(len(shapes))], motion,
                                sizes[rng.integers(len(sizes))]))
        apart = all(contrast(t.colour, background) >= MIN_CONTRAST for t in things)
        if pair:
            first, second = (np.array(COLOURS[t.colour], np.float32) for t in things)
            apart = apart and np.linalg.norm(first - second) >= MIN_CONTRAST
        if apart:
            return Meaning(tuple(things), texture, background)


def draw_meanings(count: int, seed: int, held: bool = False, pair_share: float = 0.2) -> list[Meaning]:
    """`count` meanings, all held out of training (`held`) or none."""
    rng = np.random.default_rng(seed)
    found: list[Meaning] = []
    while len(found) < count:
        meaning = draw_meaning(rng, pair_share)
        if held_out(meaning) == held:
            found.append(meaning)
    return found


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _thing_words(thing: Thing, pick) -> str:
    size, shape = pick(_SIZE_WORDS[thing.size]), pick(_SHAPE_WORDS[thing.shape])
    return _article(f"{size} {thing.colour} {shape}".strip())


def caption_of(meaning: Meaning, rng: np.random.Generator) -> str:
    """The meaning in English, worded at random; `parse` reads it back."""

    def pick(options):
        return options[rng.integers(len(options))]

    said = [f"{_thing_words(t, pick)} {pick(_MOTION_WORDS[t.motion]).format(v=pick(_VERBS))}" for t in meaning.things]
    joined = pick((" and ", " while ")).join(said)
    texture = pick(_TEXTURE_WORDS[meaning.texture])
    order = (texture, meaning.background) if rng.random() < 0.6 else (meaning.background, texture)
    ground = f"{pick(_PREPOSITIONS)} " + _article(" ".join(w for w in order if w)) + " background"
    if rng.random() < 0.2:
        return f"{ground}, {joined}"
    return f"{pick(_OPENINGS)}{joined} {ground}"


# --- reading a caption ------------------------------------------------------------------------------------------------

_COLOUR_ALIASES = {**{c: c for c in COLOURS}, "violet": "purple", "turquoise": "cyan", "rose": "pink"}
_SHAPE_ALIASES = {word: shape for shape, words in _SHAPE_WORDS.items() for word in words} | {"disk": "circle", "plus": "cross"}
_SIZE_ALIASES = {word: size for size, words in _SIZE_WORDS.items() for word in words if word}
_TEXTURE_ALIASES = {word: texture for texture, words in _TEXTURE_WORDS.items() for word in words if word} | {
    "checked": "checkered", "stripy": "striped"}


def _any_of(words) -> str:
    return "(?:" + "|".join(sorted((re.escape(w) for w in words), key=len, reverse=True)) + ")"


_C, _S, _Z, _T = (_any_of(w) for w in (_COLOUR_ALIASES, _SHAPE_ALIASES, _SIZE_ALIASES, _TEXTURE_ALIASES))
_GROUND = re.compile(rf"\b(?P<t1>{_T})?\s*(?P<c>{_C})?\s*(?P<t2>{_T})?\s*\b(?:background|backdrop)\b")
_THING = re.compile(rf"\b(?:(?P<z>{_Z})\s+)?(?:(?P<c>{_C})\s+)?(?P<s>{_S})s?\b")
_MOTION_PATTERNS = (
    ("bounce-up-down", r"\bbounc\w*\b.*\b(up|down|vertical\w*)\b"), ("bounce-sideways", r"\bbounc"),
    ("spin", r"\b(spin|rotat|turn|whirl)"), ("grow", r"\b(grow|bigger|larger|expand)"), ("shrink", r"\b(shrink|smaller)"),
)
_STILL = re.compile(r"\b(still|not move|motionless|stationary|rests?|resting|stays?|stands?)\b")
_KNOWN = re.compile(
    rf"\b(?:an?|the|and|while|of|on|over|against|in|front|video|clip|is|to|towards|from|side|does|not|around|"
    rf"{'|'.join(v.split()[-1] for v in _VERBS)}|moving|sliding|diagonally|gets|{_C}|{_S}|{_Z}|{_T}|background|backdrop|sign|"
    rf"left|right|up|down|upper|lower|upwards|downwards|rises|sinks|spin\w*|rotat\w*|turn\w*|grow\w*|shrink\w*|bounc\w*|"
    rf"bigger|smaller|expand\w*|still|stands|stays|rests|move)\b")


def _motion_in(text: str) -> str | None:
    for motion, pattern in _MOTION_PATTERNS:
        if re.search(pattern, text):
            return motion
    text = re.sub(r"\bfrom (left|right|top|bottom)\b", "", text)
    across = "left" if re.search(r"\bleft", text) else "right" if re.search(r"\bright", text) else ""
    along = "up" if re.search(r"\b(up|upwards?|upper|rise[sn]?|rising)\b", text) else (
        "down" if re.search(r"\b(down|downwards?|lower|sinks?|sinking|falls?|falling)\b", text) else "")
    if across or along:
        return "-".join(w for w in (along, across) if w)
    return "still" if _STILL.search(text) else None


def parse(caption: str) -> Meaning:
    """What a caption asks for, as far as the world has words for it; parts not found are None.

    A third shape is ignored (it is named in `unknown`)."""
    text = re.sub(r"\s+", " ", caption.lower()).strip()
    texture = background = None
    ground = _GROUND.search(text)
    rest = text
    if ground:
        background = _COLOUR_ALIASES.get(ground["c"])
        said = ground["t1"] or ground["t2"]
        texture = _TEXTURE_ALIASES[said] if said else "plain"
        rest = text[: ground.start()] + "." + text[ground.end():]
    found = list(_THING.finditer(rest))
    unknown = [m.group(0) for m in found[2:]]
    things = []
    for i, match in enumerate(found[:2]):
        end = found[i + 1].start() if i + 1 < len(found) else len(rest)
        motion = _motion_in(rest[match.end():end]) or (_motion_in(rest) if len(found) == 1 else None)
        things.append(Thing(_COLOUR_ALIASES.get(match["c"]), _SHAPE_ALIASES[match["s"]], motion,
                            _SIZE_ALIASES.get(match["z"], "")))
    if not things:  # nothing of ours: keep the colour and the motion, they may still be meant
        colour = re.search(rf"\b{_C}\b", rest)
        if colour or _motion_in(rest):
            things.append(Thing(_COLOUR_ALIASES[colour.group(0)] if colour else None, None, _motion_in(rest)))
    unknown += re.findall(r"[a-z]{2,}", _KNOWN.sub(" ", text))
    return Meaning(tuple(things), texture, background, tuple(unknown))


def hint(caption: str) -> str | None:
    """One line on what the small model knows, for a caption that leaves its world; None for one inside it."""
    meaning = parse(caption)
    if meaning.complete and not meaning.unknown:
        return None
    missing = [name for name, absent in (
        ("a shape", not meaning.things or any(t.shape is None for t in meaning.things)),
        ("its colour", not meaning.things or any(t.colour is None for t in meaning.things)),
        ("its motion", not meaning.things or any(t.motion is None for t in meaning.things)),
        ("a background colour", meaning.background is None)) if absent]
    said = "".join((f"; not stated: {', '.join(missing)}" if missing else "",
                    f"; words it does not know: {', '.join(dict.fromkeys(meaning.unknown))}" if meaning.unknown else ""))
    return (f"this small model knows one or two shapes ({', '.join(SHAPES)}), colours ({', '.join(COLOURS)}), motions "
            f"(eight directions, still, spins, grows, shrinks, bounces) and plain, striped, checkered or dotted backgrounds, "
            f"as in 'a small red circle moves left over a blue background'{said}")


# --- positions and frames ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Where everything is in every frame, in pixels of the frame; arrays of a batch of B clips with N shapes in all.

    clip [N] int, shape [N] int, rgb [N, 3], x/y/radius/angle [N, F] (angle in radians, clockwise),
    tone [B, 2, 3] and texture [B] int of the backgrounds.
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
                    self.tone[index], self.texture[index])


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


def plan(meanings: list[Meaning], seed: int, frames: int = FRAMES, height: int = HEIGHT) -> Plan:
    """Draw where everything is: seeded, clips of width 1.5 x height; the whole motion fits whatever number of frames."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, frames)
    clip, shape, rgb, paths = [], [], [], []
    for i, meaning in enumerate(meanings):
        pair = len(meaning.things) == 2
        for j, thing in enumerate(meaning.things):
            left, right = ((0, WIDTH / 2), (WIDTH / 2, WIDTH))[j] if pair else (0, WIDTH)
            paths.append(_path(thing, rng, t, left, right, pair))
            clip.append(i)
            shape.append(SHAPES.index(thing.shape))
            rgb.append(COLOURS[thing.colour])
    x, y, radius, angle = (np.array(part, np.float32) for part in zip(*paths))
    unit = height / HEIGHT
    return Plan(np.array(clip), np.array(shape), np.array(rgb, np.float32), x * unit, y * unit, radius * unit, angle,
                np.stack([tones(m.background) for m in meanings]), np.array([TEXTURES.index(m.texture) for m in meanings]))


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
