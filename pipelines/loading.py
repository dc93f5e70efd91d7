"""A pipeline of a folder, whatever the model: the class is the one that model_index.json names."""
from __future__ import annotations

import importlib
import os
from typing import Any

from .shared.config import ConfigError
from .shared.folders import find_folder, read_index

PIPELINES = {"CogVideoXPipeline": ".cogvideox.pipeline"}
"""`_class_name` of model_index.json, and the module that holds the class of that name."""


def load(path: str | os.PathLike, **options: Any) -> Any:
    """Reads a pipeline's folder in diffusers' layout, or fetches one by its Hugging Face Hub id.

    Args:
        path: a folder with model_index.json, or an id such as "THUDM/CogVideoX-2b" (needs huggingface_hub).
        options: dtype, device, variant, low_memory, parts: as `CogVideoXPipeline.from_pretrained` takes them.
    Raises:
        FileNotFoundError: no such folder, nothing to be had by that id, or it has no model_index.json.
        ConfigError: a pipeline of a class that is not there; further as `from_pretrained`.
    """
    index_path, index = read_index(find_folder(path))
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINES:
        raise ConfigError(f"{index_path} describes a {name}, expected a {' or a '.join(PIPELINES)} (text to video)")
    return getattr(importlib.import_module(PIPELINES[name], __package__), name).from_pretrained(os.fspath(path), **options)
