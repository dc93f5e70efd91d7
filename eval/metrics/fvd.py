"""Frechet distance between the video features of a precision and those of the exact run (FVD where the features are I3D's)."""
from __future__ import annotations

import numpy as np

from ..video import as_video
from .shared.context import missing_model

NAME = "fvd"
LABEL = "FVD-style"
UNIT = ""
DIGITS = 2
HIGHER_IS_BETTER = False
KIND = "set"
PLACE = 80
PERFECT = 0.0
WEIGHTS_KEY = "fvd"
WHAT = "a TorchScript file that maps videos [1, 3, F, 224, 224] in [-1, 1] to features [1, D] (i3d_torchscript.pt is customary)"
SIDE = 224  # pixels; I3D's input


def missing(weights) -> str | None:
    """Why it cannot run, or None."""
    return missing_model(weights, WEIGHTS_KEY, WHAT, ("torch",))


def features(video, context) -> np.ndarray:
    """The feature vector of one video: float64 [D]."""
    import torch

    if NAME not in context.models:
        context.models[NAME] = torch.jit.load(context.weights[WEIGHTS_KEY], map_location="cpu").eval()
    model = context.models[NAME]
    clip = torch.from_numpy(as_video(video)).float().permute(0, 3, 1, 2) * 2 - 1
    clip = torch.nn.functional.interpolate(clip, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    clip = clip.permute(1, 0, 2, 3)[None]
    with torch.no_grad():
        try:  # StyleGAN-V's I3D: give the features, leave range and size alone
            row = model(clip, rescale=False, resize=False, return_features=True)
        except (TypeError, RuntimeError):
            row = model(clip)
    return row.double().numpy().reshape(-1)


def frechet_distance(features_a, features_b) -> float:
    """Squared Frechet distance of two Gaussians fitted to feature rows [N, D] and [M, D].

    |mean difference|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), from singular values of the centred rows, so that D may be
    larger than N. Few rows make it large and noisy: compare only sets of one size, and look at the floor's value.

    Raises:
        ValueError: fewer than two rows, or widths that differ.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {a.shape} and {b.shape}; give [videos, width] with one width")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 videos on each side, there are {len(a)} and {len(b)}")
    centred_a = (a - a.mean(0)) / np.sqrt(len(a) - 1)
    centred_b = (b - b.mean(0)) / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()  # tr((A B)^(1/2))
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(gap + np.square(centred_a).sum() + np.square(centred_b).sum() - 2 * cross, 0.0))


measure = frechet_distance
