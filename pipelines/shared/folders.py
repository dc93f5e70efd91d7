"""A pipeline's folder in diffusers' layout: found here or fetched by its Hugging Face Hub id, its index read."""
from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import read_json
from .small_model import SMALL_MODEL, WHERE_MODELS_ARE

MODEL_INDEX_NAME = "model_index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call their weight files."""
PADDLE_STEM = "diffusion_paddle_model"
"""What ppdiffusers calls them where it does not write for diffusers; read, not written."""
PART_FILES = ("*.json", "*.model")
"""What a part has beside its weights: configurations, indices of shards, a tokenizer's model."""


def find_folder(path: str | os.PathLike, *files: str) -> str:
    """The folder itself; of a hub id a copy that has its model_index.json, to which `fetch_parts` brings the rest.

    Args:
        path: a folder or a hub id.
        files: what is wanted of a hub id beside model_index.json, such as "transformer/config.json".
    Raises:
        FileNotFoundError: no such folder, and no hub id that can be fetched.
    """
    path = _expanded(path)
    if os.path.isdir(path):
        return path
    if not _is_hub_id(path):
        raise FileNotFoundError(f"no such folder: {path}{_advice(path)}")
    return _download(path, [MODEL_INDEX_NAME, *files])


def fetch_parts(path: str | os.PathLike, folder: str, parts: Iterable[str], variant: str | None) -> str:
    """Brings the files of these parts, and no others, into the copy of what a hub id names; returns its folder.

    A part that has no weights of the variant is fetched without it, as `Model.from_pretrained` reads it.

    Args:
        path: what the caller gave; of a folder there is nothing to fetch.
        folder: what `find_folder` made of it.
        parts: the folders of the parts.
        variant: the "fp16" of "diffusion_pytorch_model.fp16.safetensors".
    Raises:
        FileNotFoundError: it cannot be fetched.
    """
    path, parts = _expanded(path), list(parts)
    if os.path.isdir(path) or not parts:
        return folder
    files = [f"{part}/{name}" for part in parts for name in PART_FILES]
    folder = _download(path, [*files, *_weights(parts, variant)])
    plain = [part for part in parts if variant and not _has_weights(folder, part, variant)]
    return _download(path, _weights(plain, None)) if plain else folder


def _weights(parts: Iterable[str], variant: str | None) -> list[str]:
    """Patterns of the weight files of one variant; those of another have a point and its name behind the stem."""
    stems = [f"{stem}.{variant}" if variant else stem for stem in (*STEMS, PADDLE_STEM)]
    return [f"{part}/{stem}{ending}" for part in parts for stem in stems
            for ending in (".safetensors", "-[0-9]*-of-*.safetensors")]


def _has_weights(folder: str, part: str, variant: str) -> bool:
    there = os.listdir(os.path.join(folder, part)) if os.path.isdir(os.path.join(folder, part)) else []
    return any(fnmatch.filter([f"{part}/{name}" for name in there], pattern) for pattern in _weights([part], variant))


def _expanded(path: str | os.PathLike) -> str:
    return os.path.expanduser(os.fspath(path))


def _is_hub_id(path: str) -> bool:
    """Whether it can be meant as owner/name: not where a folder of the owner's name is here, which the name is not in."""
    return HUB_ID.fullmatch(path) is not None and not os.path.lexists(path) and not os.path.isdir(os.path.dirname(path))


def _advice(path: str) -> str:
    """What may have been meant by a folder that is not there."""
    if os.path.lexists(path):
        return ", which is a file; give the folder that has model_index.json"
    if Path(path) == SMALL_MODEL:
        return f"; {WHERE_MODELS_ARE}"
    above, name = os.path.split(os.path.normpath(path))
    if not os.path.isdir(above or "."):
        return " (a Hugging Face Hub id has the form owner/name)"
    there = sorted(entry.name for entry in os.scandir(above or ".") if entry.is_dir() and not entry.name.startswith("."))
    near = difflib.get_close_matches(name, there, n=3) or there[:3]
    text = f"; {above or 'the current folder'} has " + (", ".join(near) if near else "no folders")
    if HUB_ID.fullmatch(path):
        text += (f". If the Hugging Face Hub's {path} is meant, fetch it with huggingface_hub.snapshot_download({path!r}) and "
                 "give its folder")
    return text


def _download(name: str, patterns: list[str]) -> str:
    """The folder of a hub id's copy, with the files that match.

    Raises:
        FileNotFoundError: it cannot be had, in one line.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{name} is not a folder here. To fetch it from the Hugging Face Hub, `pip install huggingface_hub` and run this "
            f"again; or download it elsewhere and give its folder"
        ) from None
    try:
        return snapshot_download(name, allow_patterns=patterns)
    except Exception as error:  # of several libraries, by the version: of HTTP, of the hub's own, of the disk
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise FileNotFoundError(
            f"{name} is not a folder here, and the Hugging Face Hub did not give it ({type(error).__name__}: {reason}); check "
            f"the name and the network, or download it elsewhere and give its folder"
        ) from error


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
