"""How the VAE's work on a clip is cut up: in time into pieces of a few frames, in space into tiles that overlap.

Pieces join without a seam, as every causal convolution hands on what the next piece needs (`Caches`); tiles are blended.
On several ranks each works on whole pieces, whose caches then travel (`Wavefront`), or on whole tiles; the arithmetic is that
of one rank, so the result is the same bits, and all ranks get all of it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import paddle
from paddle import nn

from lowbit_video.distributed.group import Group
from lowbit_video.distributed.shares import balanced
from lowbit_video.distributed.wavefront import Wavefront, gather_parts
from lowbit_video.runtime import paddle_runtime

FRAME, HEIGHT, WIDTH = 2, 3, 4  # axes of [B, C, T, H, W]


class Caches:
    """What each causal convolution has for the frames that follow: a list of tensors, handed from one piece to the next.

    Every convolution takes once a piece, then keeps once. On several ranks a `Wavefront` is in its place.
    """

    def __init__(self) -> None:
        self._held: dict[nn.Layer, list[paddle.Tensor]] = {}

    def take(self, conv: nn.Layer) -> list[paddle.Tensor] | None:
        """What the convolution kept of the piece before; None in the first one."""
        return self._held.pop(conv, None)

    def keep(self, conv: nn.Layer, tensors: list[paddle.Tensor]) -> None:
        """For the piece that follows. tensors: each contiguous in memory of its own."""
        self._held[conv] = tensors


@dataclass(frozen=True)
class Job:
    """Encoding or decoding, as far as cutting up needs to know it.

    name: as what its bytes are counted.
    run: works on one piece [B, C, T, H, W] with the caches of its clip.
    caches: of an input's pieces: each causal convolution, in the order of work, with the shapes that it keeps.
    piece_frames: frames of a piece.
    channels, frames_made: of the result; frames_made(frames) for one piece.
    scale_in, scale_out: height of the input and of the result, in rows a latent (8 for pixels, 1 for latents).
    group, degree: the ranks that share the work, the first `degree` (at least 2) of a group; None: this one does all of it.
    ahead: see `Wavefront`.
    on_done: told, piece by piece, how many frames are done, those of all videos added up.
    """

    name: str
    run: Callable[[paddle.Tensor, Caches | Wavefront], paddle.Tensor]
    caches: Callable[[paddle.Tensor], list[tuple[nn.Layer, list[tuple[int, ...]]]]]
    piece_frames: int
    channels: int
    frames_made: Callable[[int], int]
    scale_in: int
    scale_out: int
    group: Group | None = None
    degree: int = 1
    ahead: bool = False
    on_done: Callable[[int], object] | None = None

    def result_shape(self, shape: Sequence[int]) -> list[int]:
        """What becomes of an input of that shape, be it one piece or a whole clip."""
        batch, _, frames, height, width = shape
        made = sum(self.frames_made(stop - start) for start, stop in pieces_of(frames, self.piece_frames))
        sizes = (size * self.scale_out // self.scale_in for size in (height, width))
        return [batch, self.channels, made, *sizes]

    def tell(self, frames: int) -> None:
        if self.on_done is not None and frames:
            self.on_done(frames)


def pieces_of(frames: int, piece_frames: int) -> list[tuple[int, int]]:
    """Bounds of pieces of `piece_frames` frames; the first piece also takes the frames left over."""
    bounds = list(range(frames, -1, -piece_frames))[::-1]
    bounds[0] = 0
    return list(zip(bounds, bounds[1:])) or [(0, frames)]


def by_pieces(job: Job, x: paddle.Tensor) -> paddle.Tensor:
    """The job over the frames of x, piece by piece."""
    bounds = pieces_of(x.shape[FRAME], job.piece_frames)
    if job.group is not None and len(bounds) > 1:
        return paddle.concat(_share_pieces(job, x, bounds), axis=FRAME)
    caches, done = Caches(), []
    for start, stop in bounds:
        done.append(job.run(x[:, :, start:stop], caches))
        job.tell(x.shape[0] * (stop - start))
    return done[0] if len(done) == 1 else paddle.concat(done, axis=FRAME)


def _share_pieces(job: Job, x: paddle.Tensor, bounds: list[tuple[int, int]]) -> list[paddle.Tensor]:
    """The results of all pieces, worked on by turns: piece p by rank p % degree."""
    batch, told, mine = x.shape[0], 0, []
    wave = Wavefront(job.group, job.degree, len(bounds), job.caches(x), x, job.ahead, paddle_runtime, job.name)
    for number in wave.numbers:
        start, stop = bounds[number]
        wave.begin(number)
        mine.append(job.run(x[:, :, start:stop], wave))
        wave.end()
        job.tell(batch * (stop - told))  # those of the other ranks before this one are done too
        told = stop
    shapes = [job.result_shape(x[:, :, start:stop].shape) for start, stop in bounds]
    owners = [number % job.degree for number in range(len(bounds))]
    parts = gather_parts(mine, shapes, owners, x, job.group, paddle_runtime, job.name)
    job.tell(batch * (x.shape[FRAME] - told))
    return parts


def _share_tiles(job: Job, tiles: list[paddle.Tensor]) -> list[paddle.Tensor]:
    """The results of all tiles, each worked on by one rank."""
    owners = balanced([tile.shape[HEIGHT] * tile.shape[WIDTH] for tile in tiles], job.degree)
    alone = replace(job, group=None)
    mine = [by_pieces(alone, tile) for tile, owner in zip(tiles, owners) if owner == job.group.rank]
    shapes = [job.result_shape(tile.shape) for tile in tiles]
    parts = gather_parts(mine, shapes, owners, tiles[0], job.group, paddle_runtime, job.name)
    job.tell((len(tiles) - len(mine)) * tiles[0].shape[0] * tiles[0].shape[FRAME])
    return parts


def by_tiles(job: Job, x: paddle.Tensor, tile: Sequence[int], overlap: Sequence[float]) -> paddle.Tensor:
    """The job over x by tiles, where x is larger than one.

    tile: height and width of a tile, in latents. overlap: the part of each that is shared with the next tile. Tiles lie at a
    stride of the part that is not shared, and each is faded in over the shared part from the one above and the one on the left.
    Ranks share tiles where there is one for each of them, else the pieces of each tile.
    """
    if x.shape[HEIGHT] <= tile[0] * job.scale_in and x.shape[WIDTH] <= tile[1] * job.scale_in:
        return by_pieces(job, x)
    strides = [max(int(size * (1 - factor)), 1) for size, factor in zip(tile, overlap)]
    shared = [(size - stride) * job.scale_out for size, stride in zip(tile, strides)]
    height, width = (stride * job.scale_out for stride in strides)
    tops, lefts = (range(0, x.shape[axis], stride * job.scale_in) for axis, stride in zip((HEIGHT, WIDTH), strides))
    tile_height, tile_width = (size * job.scale_in for size in tile)
    tiles = [x[:, :, :, top : top + tile_height, left : left + tile_width] for top in tops for left in lefts]
    is_shared = job.group is not None and len(tiles) >= job.degree
    parts = iter(_share_tiles(job, tiles)) if is_shared else (by_pieces(job, part) for part in tiles)
    above: list = []
    bands = []
    for _ in tops:
        row: list = []
        for column in range(len(lefts)):
            part = next(parts)
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
