"""What the scorer of a small model's world sees in a video of it."""
from __future__ import annotations

from typing import Any

import numpy as np

from lowbit_video.eval import world
from lowbit_video.eval.world import judge
from lowbit_video.pipelines.shared.video_files import as_uint8


def judge_video(video: np.ndarray, prompt: str, of: str, say: Any) -> dict[str, Any]:
    """Which parts of the prompt the video shows, what the scorer sees and a hint for the prompt: printed and returned.

    of: the world's name, one of `world.WORLDS`."""
    verdict = judge.score(as_uint8(video), prompt, world.WORLDS[of])
    meaning = verdict.meaning
    stated = {"background": meaning.background or meaning.texture, "camera": meaning.camera,
              **{part: any(getattr(thing, part) for thing in meaning.things) for part in ("colour", "shape", "motion")}}
    parts = {part: bool(getattr(verdict, part)) if stated[part] else None for part in verdict.parts}
    words = {True: "yes", False: "NO", None: "not asked for"}
    say("\nscorer: " + ", ".join(f"{part} {words[right]}" for part, right in parts.items()) + f"; it sees: {verdict.scene}")
    hint = world.hint(prompt, world.WORLDS[of])
    if hint:
        say(f"hint: {hint}")
    return {**parts, "sees": str(verdict.scene), "hint": hint}
