"""The model of a command that is told none: the small trained one of a checkout, or an error that says where models are."""
from __future__ import annotations

import os
from pathlib import Path

from lowbit_video.installing import pip_install

SMALL_MODEL = Path("examples", "small_cogvideox", "model")
"""The trained small model, below the checkout's root."""
WHERE_MODELS_ARE = (
    "it is part of the source checkout: run this from its root or give the folder's path. Another way is a published model: "
    f"THUDM/CogVideoX-2b, fetched after {pip_install('hub')}, or its folder"
)


def small_model() -> Path | None:
    """The trained small model of this checkout, or of the working directory; None where there is none."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / SMALL_MODEL / "model_index.json").is_file():
            return root / SMALL_MODEL
    return None


def model_or_small(given: str | os.PathLike | None) -> str:
    """The given folder or hub id; where none is given, the small trained model's folder.

    Raises:
        FileNotFoundError: none is given, and the small model is not here; says in one line how to get a model.
    """
    if given is not None:
        return os.fspath(given)
    folder = small_model()
    if folder is None:
        raise FileNotFoundError(f"no --model is given, and the small trained model, {SMALL_MODEL}, is not here: "
                                f"{WHERE_MODELS_ARE}. `lowbit-video generate --model random` makes noise with a random one")
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
