"""Orders of a video's tokens: permutations of its grid of patches that keep neighbours in space and time together.

A run of tokens in raster order is a thin strip of one frame. In "tiles" it is a row of small boxes, in "hilbert" one compact
piece of space and time; blocks of keys are such runs, and a compact one is told better by its mean.
"""
from __future__ import annotations

import functools

import numpy as np

from .arguments import shown, whole

ORDERS = ("raster", "tiles", "hilbert")
"""The orders that there are; "raster" is the one that models are trained with."""
TILE = (4, 2, 2)
"""Frames, rows and columns of a box of "tiles"."""


def check_order(order: str) -> str:
    """The order's name. Raises ValueError for one that does not exist."""
    if not isinstance(order, str) or order not in ORDERS:
        raise ValueError(f"unknown token order {shown(order)}; there are: {', '.join(ORDERS)}")
    return order


@functools.lru_cache(maxsize=32)
def token_order(order: str, frames: int, height: int, width: int) -> np.ndarray:
    """Which token of the raster stands at each place: `tokens[:, token_order(...)]` are the tokens in that order.

    order: one of ORDERS. frames, height, width: of the grid of patches, of any size; its raster counts columns, then rows, then
    frames. returns: [frames * height * width] int64, each number once, not writable.
    Raises ValueError for an order that does not exist or a size below 1, TypeError for a size that is no whole number.
    Source: of the curve J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004); it fills the
    smallest cube of a power of two around the grid, of which the cells in the grid are kept.
    """
    check_order(order)
    grid = tuple(whole(name, size, 1) for name, size in (("frames", frames), ("height", height), ("width", width)))
    cells = np.indices(grid, dtype=np.int64).reshape(3, -1)
    if order == "raster":
        places = np.arange(cells.shape[1])
    elif order == "tiles":
        places = _by_tiles(cells, grid)
    else:
        places = np.argsort(_along_hilbert(cells, (max(grid) - 1).bit_length()), kind="stable")
    places.flags.writeable = False
    return places


@functools.lru_cache(maxsize=32)
def raster_order(order: str, frames: int, height: int, width: int) -> np.ndarray:
    """The inverse of `token_order`: `ordered[:, raster_order(...)]` are the tokens in raster order again."""
    places = np.argsort(token_order(order, frames, height, width), kind="stable")
    places.flags.writeable = False
    return places


def _by_tiles(cells: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Boxes one after the other, to and fro, so that the next one always touches; within a box columns, rows, frames.

    cells: [3, N], frame, row and column of each token.
    """
    size = np.array(TILE)[:, None]
    (frame, row, column), within = cells // size, cells % size
    _, rows, columns = (-(-length // side) for length, side in zip(grid, TILE))
    row = np.where(frame % 2, rows - 1 - row, row)
    column = np.where((frame * rows + row) % 2, columns - 1 - column, column)
    return np.lexsort([*within[::-1], column, row, frame])


def _along_hilbert(cells: np.ndarray, bits: int) -> np.ndarray:
    """How far along the curve each cell lies. cells: [3, N], below 2 ** bits."""
    axes = list(cells)
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for axis in range(3):
            high = axes[axis] >> bit & 1
            swapped = np.where(high, 0, (axes[0] ^ axes[axis]) & low)
            axes[0] = axes[0] ^ np.where(high, low, swapped)
            axes[axis] = axes[axis] ^ swapped if axis else axes[0]
    for axis in (1, 2):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    turned = np.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        turned = turned ^ np.where(axes[2] >> bit & 1, (1 << bit) - 1, 0)
    distance = np.zeros_like(turned)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            distance = distance << 1 | (axis ^ turned) >> bit & 1
    return distance
