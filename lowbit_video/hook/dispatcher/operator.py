"""A dispatched call as one operator of `torch.compile`: what happens in it is decided when it runs, as in eager mode."""
from __future__ import annotations

from typing import Optional

import torch

from ...errors import UnsupportedError
from .attentions import ATTENTIONS
from .masks import read_lengths, why_no_lengths
from .watch import caller_of, calling


@torch.library.custom_op("lowbit_video::key_lengths", mutates_args=())
def key_lengths_op(mask: torch.Tensor) -> torch.Tensor:
    """`masks.read_lengths`; the calls of a graph that share a mask share this, so the host waits once a run."""
    return read_lengths(mask)


@key_lengths_op.register_fake
def _(mask):
    return torch.empty(mask.shape[0], dtype=torch.int64, device="cpu")


@torch.library.custom_op("lowbit_video::dispatched", mutates_args=())
def dispatched_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Optional[torch.Tensor],  # noqa: UP045
                  lengths: Optional[torch.Tensor], caller: Optional[torch.Tensor], is_causal: bool,  # noqa: UP045
                  scale: float | None, return_lse: bool, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`DispatchedAttention.serve`: (out, lse), lse empty unless asked for. caller: `watch.calling()`."""
    out, lse = ATTENTIONS[backend].serve(caller_of(caller), q, k, v, mask, None if lengths is None else tuple(lengths.tolist()),
                                         is_causal, scale, return_lse)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@dispatched_op.register_fake
def _(q, k, v, mask, lengths, caller, is_causal, scale, return_lse, backend):
    rows = (q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float32)


def _no_gradients(ctx, *gradients):
    raise UnsupportedError("low-bit attention has no gradients: run under torch.no_grad(), or set another attention backend")


dispatched_op.register_autograd(_no_gradients)


def attend(q, k, v, mask, is_causal, scale, return_lse, backend):
    """(out, lse [B, H, Nq] or None) of a call, at once or as an operator of the graph that torch.compile traces."""
    if not torch.compiler.is_compiling():
        return ATTENTIONS[backend].serve(caller_of(calling()), q, k, v, mask, None, is_causal, scale, return_lse)
    lengths = None if mask is None or why_no_lengths(mask, k.shape[0], k.shape[1]) else key_lengths_op(mask)
    out, lse = dispatched_op(q, k, v, mask, lengths, calling(), is_causal, scale, return_lse, backend)
    return out, lse if return_lse else None
