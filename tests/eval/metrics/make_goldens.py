"""Make goldens.json: figures from independent implementations (piq, torchmetrics, AlexNet in PyTorch) on seeded clips.

SSIM is piq's: whole windows only, as Wang et al. average and as scikit-image does (torchmetrics pads the border).
MS-SSIM is taken of one channel: implementations differ in how they join three.
Run once where torch, piq and torchmetrics are installed: `python tests/eval/metrics/make_goldens.py`. Tests only read the JSON.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

PAIRS = {"small": (2, 64, 80), "film": (2, 128, 192), "large": (1, 176, 208)}
NOISES = (0.01, 0.1, 0.4)
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
ALEXNET = ((64, 3, 11, 4, 2), (192, 64, 5, 1, 2), (384, 192, 3, 1, 1), (256, 384, 3, 1, 1), (256, 256, 3, 1, 1))


def seeded_pair(size, noise, seed=7):
    """A smooth moving clip and a noisy copy of it, float64 [F, H, W, 3] in [0, 1]."""
    frames, height, width = size
    rng = np.random.default_rng(seed)
    t, y, x, c = np.meshgrid(*[np.arange(n) for n in (frames, height, width, 3)], indexing="ij")
    video = 0.5 + 0.3 * np.sin(0.11 * x + 0.07 * y + 0.5 * t + c) + 0.1 * ((x // 16 + y // 16) % 2)
    return (video + noise * rng.standard_normal(video.shape)).clip(0, 1), video.clip(0, 1)


def seeded_alexnet(seed=3):
    """Random LPIPS weights under their published names: torchvision's `features.N`, and the linear layers."""
    rng = np.random.default_rng(seed)
    weights = {}
    for index, (out, into, side, _, _) in zip((0, 3, 6, 8, 10), ALEXNET):
        fan = into * side * side
        kernel = rng.standard_normal((out, into, side, side)) * (2 / fan) ** 0.5
        weights[f"features.{index}.weight"] = kernel.astype(np.float32)
        weights[f"features.{index}.bias"] = (0.1 * rng.standard_normal(out)).astype(np.float32)
    for index, (out, *_) in enumerate(ALEXNET):
        weights[f"lin{index}.model.1.weight"] = rng.random((1, out, 1, 1)).astype(np.float32)
    return weights


def torch_lpips(video, reference, weights):
    """LPIPS (AlexNet, version 0.1) with PyTorch's own convolutions, one figure a frame."""
    import torch
    import torch.nn.functional as F

    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    total, maps = 0.0, []
    for clip in (video, reference):
        x = (torch.from_numpy(clip).float().permute(0, 3, 1, 2) * 2 - 1 - shift) / scale
        taps = []
        for level, (index, (_, _, _, stride, pad)) in enumerate(zip((0, 3, 6, 8, 10), ALEXNET)):
            if level in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(F.conv2d(x, torch.from_numpy(weights[f"features.{index}.weight"]),
                                torch.from_numpy(weights[f"features.{index}.bias"]), stride, pad))
            taps.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        maps.append(taps)
    for level, (a, b) in enumerate(zip(*maps)):
        total = total + F.conv2d((a - b).pow(2), torch.from_numpy(weights[f"lin{level}.model.1.weight"])).mean((1, 2, 3))
    return [float(v) for v in total]


def main():
    """Write goldens.json beside this file."""
    import piq
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    rows = []
    for name, size in PAIRS.items():
        for noise in NOISES:
            video, reference = seeded_pair(size, noise)
            a, b = (torch.from_numpy(clip).permute(0, 3, 1, 2).double() for clip in (video, reference))
            scales = sum(min(size[1:]) // 2**level >= 11 for level in range(5))
            betas = torch.tensor(MS_SSIM_WEIGHTS[:scales], dtype=torch.float64)
            rows.append({
                "pair": name, "noise": noise,
                "psnr": [float(peak_signal_noise_ratio(x, y, data_range=1.0)) for x, y in zip(a, b)],
                "ssim": piq.ssim(a, b, data_range=1.0, downsample=False, reduction="none").tolist(),
                "ms_ssim_of_red": piq.multi_scale_ssim(
                    a[:, :1], b[:, :1], data_range=1.0, scale_weights=betas / betas.sum(), reduction="none").tolist(),
            })
    video, reference = seeded_pair(PAIRS["small"], 0.1)
    distances = torch_lpips(video, reference, seeded_alexnet())
    goldens = {"paired": rows, "lpips": {"pair": "small", "noise": 0.1, "value": distances}}
    Path(__file__).with_name("goldens.json").write_text(json.dumps(goldens, indent=1) + "\n")


if __name__ == "__main__":
    main()
