"""The two worlds that the shipped CogVideoX models know: what a caption can mean, how it is said, what it looks like.

A `Meaning` says what is in a clip (scene), `caption_of` puts it into English and `parse` reads that back (captions), `plan`
draws where everything is (motion; crossings and grounds for the long world), `render` paints the frames (painting), and
`judge` compares a video with its caption.
"""
from .captions import caption_of, hint, parse
from .motion import Plan, plan
from .painting import backgrounds, paint_ground, render
from .scene import (
    CAMERAS,
    COLOURS,
    FPS,
    FRAMES,
    HEIGHT,
    LONG,
    MOTIONS,
    SHAPES,
    SIZES,
    SMALL,
    TEXTURES,
    WIDTH,
    WORLDS,
    Meaning,
    More,
    World,
    draw_meanings,
    held_out,
)

__all__ = ["CAMERAS", "COLOURS", "FPS", "FRAMES", "HEIGHT", "LONG", "MOTIONS", "SHAPES", "SIZES", "SMALL", "TEXTURES", "WIDTH",
           "WORLDS", "Meaning", "More", "Plan", "World", "backgrounds", "caption_of", "draw_meanings", "held_out", "hint",
           "paint_ground", "parse", "plan", "render"]
