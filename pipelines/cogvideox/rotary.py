"""Position tables of CogVideoX: sine-cosine embeddings (2b) and rotary angles (5b, 1.5).

All tables are products of one short table per axis (frames, height, width). The short ones are made in NumPy and put
together on the device, so that a traced graph holds only the short ones.
Source: diffusers 0.42, models/embeddings.py and pipelines/cogvideo/pipeline_cogvideox.py (behaviour; own code).
"""
from __future__ import annotations

import numpy as np
import paddle

# wavelength ratio of all sine-cosine tables
THETA = 10000.0


def get_resize_crop_region_for_grid(
    source: tuple[int, int], target_width: int, target_height: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fits a grid into the trained one, keeping its aspect ratio, and centres it.

    Args:
        source: (height, width) of the video's grid, in patches.
        target_width, target_height: the grid that the model was trained on, in patches.
    Returns:
        (top, left), (bottom, right) in the trained grid's coordinates; negative where the video is larger.
    """
    height, width = source
    if height / width > target_height / target_width:
        fitted = (target_height, int(round(target_height / height * width)))
    else:
        fitted = (int(round(target_width / width * height)), target_width)
    top = int(round((target_height - fitted[0]) / 2.0))
    left = int(round((target_width - fitted[1]) / 2.0))
    return (top, left), (top + fitted[0], left + fitted[1])


def get_3d_rotary_pos_embed(
    embed_dim: int,
    crops_coords: tuple[tuple[int, int], tuple[int, int]] | None,
    grid_size: tuple[int, int],
    temporal_size: int,
    theta: float = THETA,
    grid_type: str = "linspace",
    max_size: tuple[int, int] | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Makes the rotary tables of a video's tokens, in the order frames, rows, columns.

    A quarter of the head dim turns with time, three eighths each with height and width; neighbours share an angle.

    Args:
        embed_dim: head dim, a multiple of 16.
        crops_coords: for "linspace": (top, left), (bottom, right) from `get_resize_crop_region_for_grid`.
        grid_size: (height, width) in patches.
        temporal_size: latent frames (1.5: frames after temporal patching).
        grid_type: "linspace" stretches the grid over crops_coords (CogVideoX 1.0); "slice" counts patches from 0 (1.5).
        max_size: for "slice": (height, width) of the trained grid, which the video's may not exceed.
    Returns:
        cos, sin: each [temporal_size * height * width, embed_dim], float32, on the current device.
    Raises:
        ValueError: a head dim that does not divide, an unknown grid_type, a grid larger than max_size.
    """
    if embed_dim % 16:
        raise ValueError(f"rotary embedding needs a head dim that is a multiple of 16, not {embed_dim}")
    height, width = grid_size
    if grid_type == "linspace":
        if crops_coords is None:
            raise ValueError("grid_type 'linspace' needs crops_coords; see get_resize_crop_region_for_grid")
        (top, left), (bottom, right) = crops_coords
        rows = np.linspace(top, bottom * (height - 1) / height, height, dtype=np.float32)
        columns = np.linspace(left, right * (width - 1) / width, width, dtype=np.float32)
    elif grid_type == "slice":
        if max_size is None:
            raise ValueError("grid_type 'slice' needs max_size, the trained grid (height, width)")
        if height > max_size[0] or width > max_size[1]:
            raise ValueError(
                f"a grid of {height} x {width} patches is larger than the {max_size[0]} x {max_size[1]} that the model "
                f"was trained on; choose a smaller height or width"
            )
        rows = np.arange(height, dtype=np.float32)
        columns = np.arange(width, dtype=np.float32)
    else:
        raise ValueError(f"grid_type {grid_type!r} is not known; use 'linspace' (CogVideoX 1.0) or 'slice' (1.5)")
    frames = np.arange(temporal_size, dtype=np.float32)

    spatial_dim = embed_dim // 8 * 3
    angles = [
        _rotary_angles(embed_dim // 4, frames, theta),
        _rotary_angles(spatial_dim, rows, theta),
        _rotary_angles(spatial_dim, columns, theta),
    ]
    return _over_grid([np.cos(a) for a in angles]), _over_grid([np.sin(a) for a in angles])


def get_3d_sincos_pos_embed(
    embed_dim: int,
    grid_size: tuple[int, int],
    temporal_size: int,
    spatial_interpolation_scale: float = 1.0,
    temporal_interpolation_scale: float = 1.0,
) -> paddle.Tensor:
    """Makes the additive position embeddings of a video's tokens, in the order frames, rows, columns.

    The first quarter of the channels tells the frame, the next three eighths the column, the rest the row.

    Args:
        embed_dim: channels, a multiple of 16.
        grid_size: (height, width) in patches.
        temporal_size: latent frames.
        spatial_interpolation_scale, temporal_interpolation_scale: positions are divided by these.
    Returns:
        [temporal_size * height * width, embed_dim], float32, on the current device.
    """
    if embed_dim % 16:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 16, not {embed_dim}")
    height, width = grid_size
    spatial_dim = embed_dim // 8 * 3
    frames = _sincos(embed_dim // 4, np.arange(temporal_size, dtype=np.float32) / temporal_interpolation_scale)
    rows = _sincos(spatial_dim, np.arange(height, dtype=np.float32) / spatial_interpolation_scale)
    columns = _sincos(spatial_dim, np.arange(width, dtype=np.float32) / spatial_interpolation_scale)
    return _over_grid([frames, rows, columns], order=(0, 2, 1))


def _rotary_angles(dim: int, positions: np.ndarray, theta: float) -> np.ndarray:
    """Returns [positions, dim] float32 angles; each appears twice, side by side."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    return np.repeat(np.outer(positions, frequencies), 2, axis=1)


def _sincos(dim: int, positions: np.ndarray) -> np.ndarray:
    """Returns [positions, dim]: dim/2 sines, then dim/2 cosines, computed in float64."""
    frequencies = 1.0 / THETA ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _over_grid(tables: list[np.ndarray], order: tuple[int, int, int] = (0, 1, 2)) -> paddle.Tensor:
    """Spreads the tables of frames, rows and columns over their grid and joins their channels.

    Args:
        tables: [T, a], [H, b], [W, c].
        order: in which order the channels of the three are joined.
    Returns:
        [T * H * W, a + b + c], float32.
    """
    sizes = [len(table) for table in tables]
    parts = []
    for axis, table in enumerate(tables):
        shape = [1, 1, 1, table.shape[1]]
        shape[axis] = sizes[axis]
        part = paddle.to_tensor(np.ascontiguousarray(table, dtype=np.float32))
        parts.append(part.reshape(shape).expand([*sizes, table.shape[1]]))
    joined = paddle.concat([parts[i] for i in order], axis=-1)
    return joined.reshape([sizes[0] * sizes[1] * sizes[2], -1])
