"""What a metric may need beside the frames: the caption, weights that the user named, and work shared between metrics."""
from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .device import Device


@dataclass
class Context:
    """One video's surroundings.

    caption: the prompt it was made from. weights: name -> file or folder, as given with `--weights name=path`.
    cache: results of one video that several metrics use. models: loaded models, kept for the whole run.
    world: name of the small model's world whose captions they are.
    device: where the metrics of a pair compute that can do so on a device; None: on the CPU.
    """

    caption: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)
    cache: dict = field(default_factory=dict)
    models: dict = field(default_factory=dict)
    world: str = "shapes"
    device: Device | None = None


def absent(packages) -> list[str]:
    """Those of the packages that cannot be imported here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def missing_model(weights: Mapping[str, str], key: str, what: str, packages=()) -> str | None:
    """Why a model-based metric cannot run, or None: its weights are not named or not there, or a package is not installed."""
    reasons = []
    if key not in weights:
        reasons.append(f"needs --weights {key}=PATH: {what}")
    elif not Path(weights[key]).exists():
        reasons.append(f"--weights {key}={weights[key]}: no such file or folder ({what})")
    if lacking := absent(packages):
        reasons.append(f"needs the package{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}")
    return "; ".join(reasons) or None
