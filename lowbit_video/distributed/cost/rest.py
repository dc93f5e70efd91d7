"""What is not attention: matrix products and elementwise work of the layers, decoding, memory."""
from __future__ import annotations

from ...precision import as_precision
from ..mesh import Degrees
from .attention import gathers
from .models import GIB
from .task import Share, Task
from .wire import Transfers, ring_bytes

MATRIX_TILE = 128
"""Rows and columns of a tile of a matrix product."""
LIVE = 10
"""Tensors [B, rows, channels] alive at a block's peak: residual, its norm, and feed-forward's four before and after GELU."""
PIECE = 2
"""Latent frames that the VAE decodes at a time; the first piece also takes what is left over."""


def product_ms(task: Task, rows: int, columns: int, inner: int) -> float:
    """One matrix product, in waves of tiles over the multiprocessors."""
    sms = task.figures.gpu.sms
    tiles = -(-rows // MATRIX_TILE) * -(-columns // MATRIX_TILE)
    operations = -(-tiles // sms) * sms * MATRIX_TILE**2 * inner * 2
    return operations / task.program.matrix_tflops / 1e9


def linear_ms(task: Task, share: Share) -> float:
    """One layer without attention: projections, feed-forward, norms, gates."""
    rows, width = share.batch * share.rows, task.model.width_of_token
    products = 4 * product_ms(task, rows, width, width)
    products += product_ms(task, rows, 4 * width, width) + product_ms(task, rows, width, 4 * width)
    apart = as_precision(task.precision).exact or share.rows < task.tokens  # then no kernel has norms and positions in it
    return products + rows * width * (task.program.elementwise_ps + apart * task.program.prologue_ps) / 1e9


def decode_pieces(task: Task) -> list[int]:
    """Frames of each piece that the VAE decodes, in order."""
    temporal = task.model.temporal
    latent = (task.size[0] - 1) // temporal + 1
    first = latent - PIECE * (max(1, latent // PIECE) - 1)
    return [temporal * (first - 1) + 1] + [temporal * PIECE] * ((latent - first) // PIECE)


def decode_ms(task: Task, degrees: Degrees) -> float:
    """Decoding by `vae` ranks: pieces go round; a layer of a piece waits for the caches of that layer of the piece before."""
    frames, height, width = task.size
    layers, ranks = int(task.figures.video.decode_layers), degrees.vae
    handed = 0.0
    if ranks > 1:
        handed = Transfers(task, degrees).neighbour_ms(task.figures.video.cache_bytes * height * width / layers, "vae")
    free = [0.0] * ranks  # when each rank has finished its last piece
    before = [0.0] * layers  # when each layer of the piece before was done
    for number, piece in enumerate(decode_pieces(task)):
        one = piece * height * width * task.figures.video.decode_ns / 1e6 / layers
        now = free[number % ranks]
        for step in range(layers):
            now = max(now, before[step] + (handed if number else 0.0)) + one
            before[step] = now
        free[number % ranks] = now
    return max(free)


def best_vae(task: Task, degrees: Degrees) -> int:
    """The smallest number of ranks that decodes fastest."""
    choices = range(1, min(degrees.ranks, len(decode_pieces(task))) + 1)
    return min(choices, key=lambda vae: decode_ms(task, Degrees(degrees.cfg, degrees.ulysses, degrees.ring, vae)))


def memory_gib(task: Task, degrees: Degrees, share: Share) -> dict[str, float]:
    """GiB of the busiest GPU by part: all weights are on each, denoising and decoding take turns."""
    model = task.model
    _, height, width = task.size
    working = LIVE * share.batch * share.rows * model.width_of_token * 2
    if degrees.ulysses > 1:  # what is sent and what arrives
        working += 2 * task.wire.operand_bytes(share.batch, model.heads, share.rows)
    if gathers(task, degrees, share):  # as they arrive, and put together
        working += 2 * task.wire.ring_bytes(share.batch, model.heads, task.tokens)
    elif degrees.ring > 1:  # the part at hand and the next
        working += 2 * ring_bytes(task, share, share.heads)
    decoding = task.figures.video.decode_bytes * height * width
    return {"transformer": model.weights_gib, "text encoder": model.text_encoder_gib if task.text_encoder else 0.0,
            "vae": model.vae_gib, "working": max(working, decoding) / GIB, "runtime": task.figures.video.runtime_gib}
