"""The CLIP model that CLIPSIM and CLIP-temporal share: a local transformers folder, loaded once."""
from __future__ import annotations

import numpy as np

from ...video import as_uint8
from .context import Context

WEIGHTS_KEY = "clip"
WHAT = "a folder with a transformers CLIPModel and its CLIPProcessor (clip-vit-base-patch32 is customary)"
PACKAGES = ("torch", "transformers", "PIL")


def load(context: Context):
    """(model, processor), from the folder that the user named; nothing is downloaded."""
    if WEIGHTS_KEY not in context.models:
        from transformers import CLIPModel, CLIPProcessor

        folder = context.weights[WEIGHTS_KEY]
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        context.models[WEIGHTS_KEY] = model, CLIPProcessor.from_pretrained(folder, local_files_only=True)
    return context.models[WEIGHTS_KEY]


def unit_rows(features) -> np.ndarray:
    """Rows of a torch tensor [N, D] (or of an output that holds one as `pooler_output`) scaled to length 1, float64."""
    rows = getattr(features, "pooler_output", features).double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def image_features(video, context: Context) -> np.ndarray:
    """CLIP embedding of each frame, length 1: [F, D]; kept for the next metric of the same video."""
    if "clip_images" not in context.cache:
        import torch
        from PIL import Image

        model, processor = load(context)
        pictures = [Image.fromarray(frame) for frame in as_uint8(video)]
        with torch.no_grad():
            inputs = processor(images=pictures, return_tensors="pt")
            context.cache["clip_images"] = unit_rows(model.get_image_features(**inputs))
    return context.cache["clip_images"]


def text_features(caption: str, context: Context) -> np.ndarray:
    """CLIP embedding of the caption, length 1: [D]."""
    import torch

    model, processor = load(context)
    with torch.no_grad():
        inputs = processor(text=[caption], return_tensors="pt", padding=True, truncation=True)
        return unit_rows(model.get_text_features(**inputs))[0]
