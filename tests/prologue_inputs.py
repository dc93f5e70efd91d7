"""Tensors as projections leave them, and steps whose tensors are a framework's."""
import numpy as np

from lowbit_video.kernels.prologue.steps import Norm, Rest, Rotary, Steps, mapped


def projected(framework, batch=1, tokens=150, heads=3, dim=32, dtype="float32", seed=0):
    """q, k, v [B, N, H, D], cut out of one projection; K has a mean."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, tokens, 3, heads, dim)) + [[[[0]], [[1]], [[0]]]] * rng.standard_normal((heads, dim)) * 2
    x = framework.tensor(x, dtype)
    return [x[:, :, part] for part in range(3)]


def made_steps(framework, dim=32, rotary=(10, 140), kind="layer", dtype="float32", seed=7):
    """Two norms of a kind, and positions of (first token, tokens), or None."""
    rng = np.random.default_rng(seed)
    norms = [kind and Norm(kind, 1e-6, 1 + 0.3 * rng.standard_normal(dim), 0.4 * rng.standard_normal(dim)) for _ in "qk"]
    if rotary is not None:
        angles = np.repeat(rng.uniform(0, 6, (rotary[1], dim // 2)), 2, 1)
        rotary = Rotary(np.cos(angles), np.sin(angles), *rotary)
    return mapped(Steps(*norms, rotary),
                  lambda name, array: framework.tensor(array, "float32" if name in ("cos", "sin") else dtype))


def in_two(framework, tensors, seam):
    """q, k and v [B, N, H, D] up to a token, each in memory of its own, and the rest, cut out of one."""
    arrays = [framework.numpy(x) for x in tensors]
    rest = framework.tensor(np.stack([x[:, seam:] for x in arrays], 2), str(arrays[0].dtype))
    return [framework.tensor(x[:, :seam].copy(), str(x.dtype)) for x in arrays], Rest(*(rest[:, :, part] for part in range(3)))


def by_hand(framework, q, k, steps):
    """q and k of float32 after their steps, in NumPy's float64."""
    arrays, found = mapped(steps, lambda _, tensor: framework.numpy(tensor).astype(np.float64)), []
    for x, norm in ((q, arrays.q_norm), (k, arrays.k_norm)):
        x = framework.numpy(x).astype(np.float64)
        if norm is not None:
            x = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * norm.weight + norm.bias
        if arrays.rotary is not None:
            cos, sin, begin, tokens = arrays.rotary
            pairs = x[:, begin:begin + tokens]
            turned = pairs[..., ::2] + 1j * pairs[..., 1::2]
            turned = turned * (cos + 1j * sin)[None, :, None, ::2]
            pairs[..., ::2], pairs[..., 1::2] = turned.real, turned.imag
        found.append(framework.tensor(x))
    return found
