"""The small world that the shipped CogVideoX knows: what a caption can mean, how it is said, what it looks like.

A `Meaning` says what is in a clip (scene), `caption_of` puts it into English and `parse` reads that back (captions), `plan`
draws where everything is (motion), `render` paints the frames (painting), and `judge` compares a video with its caption.
"""
from .captions import caption_of, hint, parse
from .motion import Plan, plan
from .painting import backgrounds, render
from .scene import COLOURS, FPS, FRAMES, HEIGHT, MOTIONS, SHAPES, SIZES, TEXTURES, WIDTH, Meaning, draw_meanings, held_out

__all__ = ["COLOURS", "FPS", "FRAMES", "HEIGHT", "MOTIONS", "SHAPES", "SIZES", "TEXTURES", "WIDTH", "Meaning", "Plan",
           "backgrounds", "caption_of", "draw_meanings", "held_out", "hint", "parse", "plan", "render"]
