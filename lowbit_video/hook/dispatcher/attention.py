"""`DispatchedAttention`: what becomes of a dispatcher's call: low bit, by lengths where a mask says so, or exact and why."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...engine.checks import request_of
from ...engine.options import AttentionOptions, options_of
from ...engine.run import run
from ...engine.select import select
from ...errors import NonFiniteError, UnsupportedError
from ...rung import as_rung
from ...runtime import torch_runtime
from ..attend import exact_attend
from ..processors import DTYPES, reason_of
from .masks import NO_PREFIX, lengths_of, why_no_lengths
from .watch import Watched


class DispatchedAttention:
    """Attention of [B, N, H, D] tensors at a backend's precision.

    precision: or a rung with pooled keys. "exact" is diffusers' own backend "native", to the bit and under any mask.
    fallback: "exact" runs exact attention where no low-bit kernel serves a call or exact attention is measured to be faster,
    and notes why; None makes that an UnsupportedError.
    backend, check_finite: as in LowBitAttnProcessor. where: what the report says before the variant. hint: what errors say
    can be done.
    """

    hint = ""

    def __init__(self, name: str, precision: str, fallback: str | None, backend: str = "auto", check_finite: bool | None = None,
                 where: str = "") -> None:
        self.name, self.fallback, self.backend, self.check_finite, self.where = name, fallback, backend, check_finite, where
        self.precision, self.pooled = as_rung(precision)

    def serve(self, caller: Watched | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
              lengths: tuple[int, ...] | None, is_causal: bool, scale: float | None, return_lse: bool
              ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, lse [B, H, Nq] or None) of one call.

        caller: the module that calls, or None. mask: as torch's attention takes it, or [B, Nk]. lengths: of the mask, where
        a graph has read them.
        Raises UnsupportedError, or NonFiniteError (on a CPU), naming the module.
        """
        exact = "exact" if mask is None else "exact (masked)"
        if self.precision.spec == "exact":
            self._note(caller, exact)
            return self._exact(caller, q, k, v, mask, is_causal, scale, return_lse)
        try:
            out, lse, what, tiles = self._low_bit(q, k, v, mask, lengths, is_causal, scale, return_lse)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self._caller(caller)}: {error}") from error
        except UnsupportedError as error:
            if self.fallback is None:
                raise UnsupportedError(f"{self._caller(caller)}: {error}{self.hint}") from error
            self._note(caller, exact, reason_of(error))
            return self._exact(caller, q, k, v, mask, is_causal, scale, return_lse)
        self._note(caller, what, tiles=tiles)
        return out, lse

    def _note(self, caller: Watched | None, variant: str, reason: str = "", tiles: tuple[int, int] | None = None) -> None:
        if caller is not None:
            caller.record.note(f"{self.where}{variant}", reason, tiles)

    def _low_bit(self, q, k, v, mask, lengths, is_causal, scale, return_lse):
        """(out, lse or None, what ran, tiles kept and pooled or None).

        Raises UnsupportedError with the reason where low bit does not serve the call.
        """
        if torch_runtime.wants_gradients(q, k, v):
            raise UnsupportedError("gradients are recorded, and low-bit attention has none; run under torch.no_grad()")
        dtype = torch_runtime.dtype_name(q)
        if dtype not in DTYPES:
            raise UnsupportedError(f"the tensors have dtype {dtype}; low-bit attention takes {', '.join(DTYPES)}")
        if is_causal and q.shape[1] != k.shape[1]:
            raise UnsupportedError(f"is_causal with {q.shape[1]} queries and {k.shape[1]} keys: torch lets query i see key i, "
                                   "low-bit attention lets the last query see the last key")
        options = options_of(self.precision, "NHD", is_causal, scale, return_lse, self.backend, self.check_finite,
                             self.fallback == "exact", self.pooled)
        if mask is None:
            out, lse, variant = run(q, k, v, options)
            return out, lse, f"{_what(options)} ({variant.name})", _tiles(options, q, [k.shape[1]] * q.shape[0])
        reason = why_no_lengths(mask, k.shape[0], k.shape[1])
        if reason is not None:
            raise UnsupportedError(reason)
        select(request_of(q, k, v, options, None, torch_runtime), options.backend)  # before the host waits for the mask
        return _of_leading_keys(q, k, v, lengths_of(mask) if lengths is None else lengths, options)

    def _exact(self, caller, q, k, v, mask, is_causal, scale, return_lse):
        if return_lse:
            if mask is not None or (is_causal and q.shape[1] != k.shape[1]):
                raise UnsupportedError(f"{self._caller(caller)}: return_lse is not served with this mask, nor by exact "
                                       "attention: torch's has no LSE; pass return_lse=False")
            return exact_attend(q, k, v, is_causal, scale, True)
        return exact_attention(q, k, v, mask, is_causal, scale), None

    def _caller(self, caller: Watched | None) -> str:
        return f"diffusers' backend {self.name}" + (f", attention module {caller.record.name!r}" if caller is not None else "")


def _what(options: AttentionOptions) -> str:
    return str(options.precision) if options.pools is None else f"{options.precision} {options.pooled}"


def _tiles(options: AttentionOptions, q: torch.Tensor, keys: Sequence[int]) -> tuple[int, int] | None:
    """Pairs of a query tile and a key tile that were kept and pooled; None where none are. keys: how many each sample has."""
    if options.pools is None:
        return None
    counts = [options.pooled.tiles(1, q.shape[2], q.shape[1], of, q.shape[3]) for of in keys]
    return sum(kept for kept, _ in counts), sum(pooled for _, pooled in counts)


def _of_leading_keys(q, k, v, lengths: tuple[int, ...], options: AttentionOptions):
    """As `_low_bit`, with each sample's first keys alone; samples of one length together, others one by one."""
    if NO_PREFIX in lengths:
        raise UnsupportedError("the keys that the mask leaves do not lead in every sample")
    if len(set(lengths)) == 1:
        out, lse, variant = run(q, k[:, :lengths[0]], v[:, :lengths[0]], options)
    else:
        parts = [run(q[i:i + 1], k[i:i + 1, :n], v[i:i + 1, :n], options) for i, n in enumerate(lengths)]
        out, variant = torch.cat([part[0] for part in parts]), parts[0][2]
        lse = torch.cat([part[1] for part in parts]) if options.return_lse else None
    each = lengths if len(lengths) == q.shape[0] else lengths * q.shape[0]
    return out, lse, f"{_what(options)} ({variant.name}, leading keys)", _tiles(options, q, each)


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool,
                    scale: float | None) -> torch.Tensor:
    """What diffusers' own backend "native" computes of [B, N, H, D] tensors, to the bit."""
    if mask is not None and tuple(mask.shape) == (q.shape[0], k.shape[1]):
        mask = mask[:, None, None, :]
    q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(0, 2, 1, 3)
