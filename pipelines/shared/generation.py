"""A model folder's generation.json: how its videos are made unless told otherwise, and the world that they show."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowbit_video.files import read_json

GENERATION_NAME = "generation.json"
KEYS = {
    "steps": ("steps", "num_inference_steps"), "guidance": ("guidance", "guidance_scale"), "frames": ("frames", "num_frames"),
    "height": ("height",), "width": ("width",), "fps": ("fps",), "prompt": ("prompt",), "world": ("world",),
}
"""Our names, and what the file calls them: the first that is there counts. "world" names what can judge the videos."""


def read_stored(folder: str | os.PathLike) -> dict[str, Any]:
    """What the file holds, as it is; empty where there is none. ValueError for a file that is not a JSON object."""
    path = Path(folder) / GENERATION_NAME
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; correct it or remove it") from None


def read_generation(folder: str | os.PathLike) -> dict[str, Any]:
    """What the file sets, by our names; keys that are not ours are left out. ValueError as `read_stored`."""
    stored = read_stored(folder)
    found = {name: [stored[key] for key in keys if stored.get(key) is not None] for name, keys in KEYS.items()}
    return {name: values[0] for name, values in found.items() if values}
