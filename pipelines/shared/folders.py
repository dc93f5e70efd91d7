"""A pipeline's folder in diffusers' layout: found here or fetched by its Hugging Face Hub id, its index read."""
from __future__ import annotations

import os
import re
from typing import Any

from .config import read_json

MODEL_INDEX_NAME = "model_index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.model"]


def find_folder(path: str | os.PathLike) -> str:
    """The folder itself, or a downloaded copy of what a hub id names.

    Raises:
        FileNotFoundError: no such folder, and no hub id or no huggingface_hub to fetch it with.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return path
    if not HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"no such folder: {path} (a Hugging Face Hub id has the form owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{path} is not a folder here. To fetch it from the Hugging Face Hub, `pip install huggingface_hub` and run this "
            f"again; or download it elsewhere and give its folder"
        ) from None
    return snapshot_download(path, allow_patterns=HUB_FILES)


def read_index(folder: str) -> tuple[str, dict[str, Any]]:
    """(path, content) of a folder's model_index.json.

    Raises:
        FileNotFoundError: the folder has none.
        ConfigError: it is not a JSON object.
    """
    path = os.path.join(folder, MODEL_INDEX_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder} is not a pipeline: it has no {MODEL_INDEX_NAME}")
    return path, read_json(path)
