"""What masks of torch's attention say of lengths: how many keys each sample has, where those that count come first."""
from __future__ import annotations

from typing import Any

import torch

from ..masks import HIDDEN
from ..read_once import read_once


class Source:
    """The mask that a model gives to all its blocks, each of which makes its attention's mask of it the same way.

    given: that mask, or None. kind: of processor that makes the other one.
    """

    def __init__(self, given: Any, kind: type) -> None:
        self.given, self.kind = given, kind

    def lengths(self, mask: torch.Tensor) -> tuple[int, ...] | None:
        """Keys of each sample of a mask [B, H or 1, Nq or 1, M] made of this one; None where they are not the first ones.

        The host waits for the mask once as long as the given one lives and is not written to; at every call where there is
        none, or where it was made under torch.inference_mode and so does not tell that it was written to.
        """
        if not isinstance(self.given, torch.Tensor):
            return leading_keys(mask)
        return read_once(self.given, (self.kind, mask.dtype, mask.shape), lambda: leading_keys(mask))


def leading_keys(mask: torch.Tensor) -> tuple[int, ...] | None:
    """How many keys each sample attends to, if all its heads and queries attend to the first ones of it and to no others.

    mask: bool (True attends) or added to scores (0 attends, HIDDEN or less hides), [B, H or 1, Nq or 1, M].
    returns: a length, at least 1, for each row of the mask; None for any other mask. The host waits.
    """
    shown = mask if mask.dtype == torch.bool else mask == 0
    counts = shown[:, 0, 0].sum(-1)
    leads = torch.arange(mask.shape[-1], device=mask.device) < counts[:, None]
    fits = (shown == leads[:, None, None]).all() & (counts > 0).all()
    if mask.dtype != torch.bool:
        fits &= (shown | (mask <= HIDDEN)).all()
    *lengths, whole = torch.cat([counts, fits[None].to(counts)]).tolist()
    return tuple(lengths) if whole else None
