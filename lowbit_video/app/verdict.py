"""What the scorer of the world of shapes sees in a video of the small model."""
from __future__ import annotations

from typing import Any

import numpy as np

from lowbit_video.eval import world
from lowbit_video.eval.world import judge
from lowbit_video.pipelines.shared.video_files import as_uint8


def judge_shapes(video: np.ndarray, prompt: str, say: Any) -> dict[str, Any]:
    """Which parts of the prompt the video shows, what the scorer sees and a hint for the prompt: printed and returned."""
    verdict = judge.score(as_uint8(video), prompt)
    meaning = verdict.meaning
    stated = {"background": meaning.background or meaning.texture,
              **{part: any(getattr(thing, part) for thing in meaning.things) for part in ("colour", "shape", "motion")}}
    parts = {part: bool(getattr(verdict, part)) if stated[part] else None for part in judge.PARTS}
    words = {True: "yes", False: "NO", None: "not asked for"}
    say("\nscorer: " + ", ".join(f"{part} {words[right]}" for part, right in parts.items()) + f"; it sees: {verdict.scene}")
    hint = world.hint(prompt)
    if hint:
        say(f"hint: {hint}")
    return {**parts, "sees": str(verdict.scene), "hint": hint}
