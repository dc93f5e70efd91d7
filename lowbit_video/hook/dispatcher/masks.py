"""A mask of keys as lengths: how many keys each sample has, where those that count come first."""
from __future__ import annotations

import torch

from ..read_once import read_once

NO_PREFIX = -1
"""Stands for a sample's length where its keys do not lead, or where it has none: exact attention knows what that means."""


def why_no_lengths(mask: torch.Tensor, batch: int, keys: int) -> str | None:
    """Why a mask says more than how many keys count, by its dtype and shape; None where its values decide."""
    served = f"low bit serves boolean masks of leading keys alone, [{batch}, 1, 1, {keys}] or [{batch}, {keys}]"
    if mask.dtype != torch.bool:
        return f"the mask is {mask.dtype}; {served}"
    flat = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == 1)
    if not flat or mask.shape[0] not in (1, batch) or mask.shape[-1] != keys:
        return f"the mask has shape {list(mask.shape)}; {served}"
    return None


def lengths_of(mask: torch.Tensor) -> tuple[int, ...]:
    """Keys of each sample of a boolean [B, 1, 1, Nk] or [B, Nk] mask, NO_PREFIX where those that count do not lead.

    The host waits for the mask once and remembers the answer while the tensor lives and is not changed in place. A tensor made
    under torch.inference_mode does not tell that it was changed: such a one is read at every call.
    """
    return read_once(mask, "leading", lambda: tuple(read_lengths(mask).tolist()))


def read_lengths(mask: torch.Tensor) -> torch.Tensor:
    """The same as an int64 tensor [B] on the CPU; the host waits."""
    keys = mask.reshape(mask.shape[0], mask.shape[-1])
    counts = keys.sum(-1)
    leads = (keys[:, 1:] <= keys[:, :-1]).all(-1) & (counts > 0)
    return counts.where(leads, NO_PREFIX).cpu()
