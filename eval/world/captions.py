"""What a clip shows, in English: `caption_of` says a meaning in many ways, `parse` reads such English back."""
from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from .scene import COLOURS, CROSSINGS, SHAPES, SMALL, Meaning, Thing, World

_SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"), "square": ("square", "box"), "triangle": ("triangle",), "star": ("star",),
    "ring": ("ring", "hoop"), "cross": ("cross", "plus sign"),
}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "": ("",), "large": ("large", "big", "huge")}
_TEXTURE_WORDS = {
    "plain": ("", "plain", "solid"), "striped": ("striped",), "checkered": ("checkered", "chequered"),
    "dotted": ("dotted", "spotted"), "shaded": ("shaded", "graded"), "cloudy": ("cloudy", "mottled"),
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
    "enter-left": ("enters from the left", "comes in from the left"),
    "enter-right": ("enters from the right", "comes in from the right"),
    "leave-left": ("leaves to the left", "exits to the left"),
    "leave-right": ("leaves to the right", "exits to the right"),
}
_CAMERA_WORDS = {
    "still": ("stays still", "does not move"),
    "pan-left": ("pans left", "pans to the left"), "pan-right": ("pans right", "pans to the right"),
    "pan-up": ("pans up", "tilts up"), "pan-down": ("pans down", "tilts down"),
    "zoom-in": ("zooms in", "moves closer"), "zoom-out": ("zooms out", "pulls back"),
}
_OPENINGS = ("", "", "", "", "a video of ", "a clip of ")
_PREPOSITIONS = ("on", "over", "against", "in front of")


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
    if len(said) < 3:
        joined = pick((" and ", " while ")).join(said)
    else:
        joined = ", ".join(said[:-1]) + pick((" and ", " while ")) + said[-1]
    texture = pick(_TEXTURE_WORDS[meaning.texture])
    order = (texture, meaning.background) if rng.random() < 0.6 else (meaning.background, texture)
    ground = f"{pick(_PREPOSITIONS)} " + _article(" ".join(w for w in order if w)) + " background"
    if rng.random() < 0.2:
        return f"{ground}, {joined}{_camera_words(meaning, rng)}"
    return f"{pick(_OPENINGS)}{joined} {ground}{_camera_words(meaning, rng)}"


def _camera_words(meaning: Meaning, rng: np.random.Generator) -> str:
    """What the camera does, to be said last; that it stands still is said only now and then."""
    if meaning.camera is None or (meaning.camera == "still" and rng.random() < 0.7):
        return ""
    words = _CAMERA_WORDS[meaning.camera]
    return (", ", " while ", " as ")[rng.integers(3)] + "the camera " + words[rng.integers(len(words))]


# --- reading a caption ------------------------------------------------------------------------------------------------

_COLOUR_ALIASES = {**{c: c for c in COLOURS}, "violet": "purple", "turquoise": "cyan", "rose": "pink"}
_SHAPE_ALIASES = {word: shape for shape, words in _SHAPE_WORDS.items() for word in words} | {"disk": "circle", "plus": "cross"}
_SIZE_ALIASES = {word: size for size, words in _SIZE_WORDS.items() for word in words if word}
_TEXTURE_ALIASES = {word: texture for texture, words in _TEXTURE_WORDS.items() for word in words if word} | {
    "checked": "checkered", "stripy": "striped"}
_CAMERA_ALIASES = {word: camera for camera, words in _CAMERA_WORDS.items() for word in words} | {
    "moves left": "pan-left", "moves right": "pan-right", "moves up": "pan-up", "moves down": "pan-down",
    "is still": "still", "is static": "still", "stands still": "still", "moves back": "zoom-out"}


def _any_of(words) -> str:
    return "(?:" + "|".join(sorted((re.escape(w) for w in words), key=len, reverse=True)) + ")"


_C, _S, _Z = (_any_of(w) for w in (_COLOUR_ALIASES, _SHAPE_ALIASES, _SIZE_ALIASES))
_CAMERA = re.compile(rf",?\s*(?:\b(?:while|as|and)\s+)?\bthe camera\s+(?P<said>{_any_of(_CAMERA_ALIASES)})\b")
_CROSSING = re.compile(r"\b(?:(?P<enter>enter|com\w+ in)|leav|exit)\w*\b.*?\b(?P<side>left|right)\b")
_THING = re.compile(rf"\b(?:(?P<z>{_Z})\s+)?(?:(?P<c>{_C})\s+)?(?P<s>{_S})s?\b")
_MOTION_PATTERNS = (
    ("bounce-up-down", r"\bbounc\w*\b.*\b(up|down|vertical\w*)\b"), ("bounce-sideways", r"\bbounc"),
    ("spin", r"\b(spin|rotat|turn|whirl)"), ("grow", r"\b(grow|bigger|larger|expand)"), ("shrink", r"\b(shrink|smaller)"),
)
_STILL = re.compile(r"\b(still|not move|motionless|stationary|rests?|resting|stays?|stands?)\b")


@lru_cache
def _readers(names: tuple[str, ...], crossings: bool) -> tuple[re.Pattern, re.Pattern]:
    """Of a world with these textures: what finds its background, and what finds every word that it has a use for.

    `crossings`: whether things enter and leave."""
    texture = _any_of([word for word, name in _TEXTURE_ALIASES.items() if name in names])
    ground = re.compile(rf"\b(?P<t1>{texture})?\s*(?P<c>{_C})?\s*(?P<t2>{texture})?\s*\b(?:background|backdrop)\b")
    known = re.compile(
        rf"\b(?:an?|the|and|while|of|on|over|against|in|front|video|clip|is|to|towards|from|side|does|not|around|"
        rf"{'|'.join(v.split()[-1] for v in _VERBS)}|moving|sliding|diagonally|gets|{_C}|{_S}|{_Z}|{texture}|background|"
        rf"backdrop|sign|left|right|up|down|upper|lower|upwards|downwards|rises|sinks|spin\w*|rotat\w*|turn\w*|grow\w*|"
        rf"shrink\w*|bounc\w*|bigger|smaller|expand\w*|still|stands|stays|rests|move"
        rf"{'|enters?|comes|leaves?|exits?' if crossings else ''})\b")
    return ground, known


def _crosses(world: World) -> bool:
    return not CROSSINGS.keys().isdisjoint(world.motions)


def _motion_in(text: str, world: World) -> str | None:
    crossing = _CROSSING.search(text) if _crosses(world) else None
    if crossing:
        return f"{'enter' if crossing['enter'] else 'leave'}-{crossing['side']}"
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


def parse(caption: str, world: World = SMALL) -> Meaning:
    """What a caption asks for, as far as the world has words for it; parts not found are None.

    A shape more than the world knows is ignored (it is named in `unknown`). A camera of which nothing is said stays still."""
    text = re.sub(r"\s+", " ", caption.lower()).strip()
    texture = background = camera = None
    if world.cameras:
        moved = _CAMERA.search(text)
        camera = _CAMERA_ALIASES[moved["said"]] if moved else "still"
        text = _CAMERA.sub("", text)
    read_ground, known = _readers(tuple(world.textures), _crosses(world))
    ground = read_ground.search(text)
    rest = text
    if ground:
        background = _COLOUR_ALIASES.get(ground["c"])
        said = ground["t1"] or ground["t2"]
        texture = _TEXTURE_ALIASES[said] if said else "plain"
        rest = text[: ground.start()] + "." + text[ground.end():]
    found = list(_THING.finditer(rest))
    unknown = [m.group(0) for m in found[world.most_things:]]
    things = []
    for i, match in enumerate(found[:world.most_things]):
        end = found[i + 1].start() if i + 1 < len(found) else len(rest)
        motion = _motion_in(rest[match.end():end], world) or (_motion_in(rest, world) if len(found) == 1 else None)
        things.append(Thing(_COLOUR_ALIASES.get(match["c"]), _SHAPE_ALIASES[match["s"]], motion,
                            _SIZE_ALIASES.get(match["z"], "")))
    if not things:  # nothing of ours: keep the colour and the motion, they may still be meant
        colour = re.search(rf"\b{_C}\b", rest)
        if colour or _motion_in(rest, world):
            things.append(Thing(_COLOUR_ALIASES[colour.group(0)] if colour else None, None, _motion_in(rest, world)))
    unknown += re.findall(r"[a-z]{2,}", known.sub(" ", text))
    return Meaning(tuple(things), texture, background, tuple(unknown), camera)


def hint(caption: str, world: World = SMALL) -> str | None:
    """One line on what a small model knows, for a caption that leaves its world; None for one inside it."""
    meaning = parse(caption, world)
    if meaning.complete and not meaning.unknown:
        return None
    missing = [name for name, absent in (
        ("a shape", not meaning.things or any(t.shape is None for t in meaning.things)),
        ("its colour", not meaning.things or any(t.colour is None for t in meaning.things)),
        ("its motion", not meaning.things or any(t.motion is None for t in meaning.things)),
        ("a background colour", meaning.background is None)) if absent]
    said = "".join((f"; not stated: {', '.join(missing)}" if missing else "",
                    f"; words it does not know: {', '.join(dict.fromkeys(meaning.unknown))}" if meaning.unknown else ""))
    *textures, last = world.textures
    counts = "one or two" if world is SMALL else "two or three"
    crossings = ", enters, leaves" if _crosses(world) else ""
    camera = ", a camera that pans, tilts, zooms or stays still" if world.cameras else ""
    example = ("a small red circle moves left over a blue background" if world is SMALL else
               "a small red circle moves left and a white star spins over a striped blue background as the camera zooms in")
    return (f"this small model knows {counts} shapes ({', '.join(SHAPES)}), colours ({', '.join(COLOURS)}), motions "
            f"(eight directions, still, spins, grows, shrinks, bounces{crossings}) and {', '.join(textures)} or {last} "
            f"backgrounds{camera}, as in '{example}'{said}")
