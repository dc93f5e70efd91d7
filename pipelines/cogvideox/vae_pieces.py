"""How the VAE's work on a clip is cut up: in time into pieces of a few frames, in space into tiles that overlap.

Pieces join without a seam, as every causal convolution hands on what the next piece needs (`Caches`); tiles are blended.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle
from paddle import nn

FRAME, HEIGHT, WIDTH = 2, 3, 4  # axes of [B, C, T, H, W]


class Caches:
    """What each causal convolution has for the frames that follow: a list of tensors, handed from one piece to the next.

    Every convolution takes once a piece, then keeps once.
    """

    def __init__(self) -> None:
        self._held: dict[nn.Layer, list[paddle.Tensor]] = {}

    def take(self, conv: nn.Layer) -> list[paddle.Tensor] | None:
        """What the convolution kept of the piece before; None in the first one."""
        return self._held.pop(conv, None)

    def keep(self, conv: nn.Layer, tensors: list[paddle.Tensor]) -> None:
        """For the piece that follows."""
        self._held[conv] = tensors


@dataclass(frozen=True)
class Job:
    """Encoding or decoding, as far as cutting up needs to know it.

    run: works on one piece [B, C, T, H, W] with the caches of its clip.
    piece_frames: frames of a piece.
    scale_in, scale_out: height of the input and of the result, in rows a latent (8 for pixels, 1 for latents).
    on_done: told, after each piece, how many frames it had, those of all videos added up.
    """

    run: Callable[[paddle.Tensor, Caches], paddle.Tensor]
    piece_frames: int
    scale_in: int
    scale_out: int
    on_done: Callable[[int], object] | None = None

    def tell(self, frames: int) -> None:
        if self.on_done is not None:
            self.on_done(frames)


def pieces_of(frames: int, piece_frames: int) -> list[tuple[int, int]]:
    """Bounds of pieces of `piece_frames` frames; the first piece also takes the frames left over."""
    bounds = list(range(frames, -1, -piece_frames))[::-1]
    bounds[0] = 0
    return list(zip(bounds, bounds[1:])) or [(0, frames)]


def by_pieces(job: Job, x: paddle.Tensor) -> paddle.Tensor:
    """The job over the frames of x, piece by piece."""
    caches, done = Caches(), []
    for start, stop in pieces_of(x.shape[FRAME], job.piece_frames):
        done.append(job.run(x[:, :, start:stop], caches))
        job.tell(x.shape[0] * (stop - start))
    return done[0] if len(done) == 1 else paddle.concat(done, axis=FRAME)


def by_tiles(job: Job, x: paddle.Tensor, tile: Sequence[int], overlap: Sequence[float]) -> paddle.Tensor:
    """The job over x by tiles, where x is larger than one.

    tile: height and width of a tile, in latents. overlap: the part of each that is shared with the next tile. Tiles lie at a
    stride of the part that is not shared, and each is faded in over the shared part from the one above and the one on the left.
    """
    if x.shape[HEIGHT] <= tile[0] * job.scale_in and x.shape[WIDTH] <= tile[1] * job.scale_in:
        return by_pieces(job, x)
    strides = [max(int(size * (1 - factor)), 1) for size, factor in zip(tile, overlap)]
    shared = [(size - stride) * job.scale_out for size, stride in zip(tile, strides)]
    height, width = (stride * job.scale_out for stride in strides)
    above: list = []
    bands = []
    for top in range(0, x.shape[HEIGHT], strides[0] * job.scale_in):
        row: list = []
        for column, left in enumerate(range(0, x.shape[WIDTH], strides[1] * job.scale_in)):
            part = by_pieces(job, x[:, :, :, top : top + tile[0] * job.scale_in, left : left + tile[1] * job.scale_in])
            if above:
                part = _blend(above[column], part, shared[0], HEIGHT)
            if row:
                part = _blend(row[-1], part, shared[1], WIDTH)
            row.append(part)
        bands.append(paddle.concat([part[:, :, :, :height, :width] for part in row], axis=WIDTH))
        above = row
    return paddle.concat(bands, axis=HEIGHT)


def _blend(before: paddle.Tensor, tile: paddle.Tensor, extent: int, axis: int) -> paddle.Tensor:
    """The tile with its first `extent` rows (or columns) faded in from the last ones of the tile before."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent == 0:
        return tile
    shape = [1] * 5
    shape[axis] = extent
    fade = paddle.arange(extent, dtype="float32").reshape(shape).astype(tile.dtype) / extent
    old = paddle.slice(before, [axis], [before.shape[axis] - extent], [before.shape[axis]])
    new = paddle.slice(tile, [axis], [0], [extent])
    rest = paddle.slice(tile, [axis], [extent], [tile.shape[axis]])
    return paddle.concat([old * (1 - fade) + new * fade, rest], axis=axis)
