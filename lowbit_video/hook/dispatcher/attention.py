"""`DispatchedAttention`: what becomes of a dispatcher's call: low bit, by lengths where a mask says so, or exact and why."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ...engine.checks import request_of
from ...engine.options import AttentionOptions, options_of
from ...engine.run import run
from ...engine.select import select
from ...errors import NonFiniteError, UnsupportedError
from ...precision import as_precision
from ...runtime import torch_runtime
from ..attend import exact_attend
from ..processors import DTYPES, reason_of
from ..report import Record
from .masks import NO_PREFIX, lengths_of, why_no_lengths
from .names import backend_names


class DispatchedAttention:
    """Attention of [B, N, H, D] tensors at a backend's precision.

    fallback: "exact" runs exact attention where no low-bit kernel serves a call or exact attention is measured to be faster,
    and notes why; None makes that an UnsupportedError.
    """

    def __init__(self, name: str, precision: str, fallback: str | None) -> None:
        self.name, self.precision, self.fallback = name, as_precision(precision), fallback

    def serve(self, record: Record | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
              lengths: tuple[int, ...] | None, is_causal: bool, scale: float | None, return_lse: bool
              ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, lse [B, H, Nq] or None) of one call.

        record: of the module that calls, or None. mask: as torch's attention takes it, or [B, Nk]. lengths: of the mask, where
        a graph has read them.
        Raises UnsupportedError, or NonFiniteError (on a CPU), naming the module.
        """
        try:
            out, lse, what = self._low_bit(q, k, v, mask, lengths, is_causal, scale, return_lse)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self._caller(record)}: {error}") from error
        except UnsupportedError as error:
            if self.fallback is None:
                raise UnsupportedError(f"{self._caller(record)}: {error}") from error
            if record is not None:
                record.note("exact" if mask is None else "exact (masked)", reason_of(error))
            return self._exact(record, q, k, v, mask, is_causal, scale, return_lse)
        if record is not None:
            record.note(what)
        return out, lse

    def _low_bit(self, q, k, v, mask, lengths, is_causal, scale, return_lse):
        """(out, lse or None, what ran); UnsupportedError with the reason where low bit does not serve the call."""
        if torch_runtime.wants_gradients(q, k, v):
            raise UnsupportedError("gradients are recorded, and low-bit attention has none; run under torch.no_grad()")
        dtype = torch_runtime.dtype_name(q)
        if dtype not in DTYPES:
            raise UnsupportedError(f"the tensors have dtype {dtype}; low-bit attention takes {', '.join(DTYPES)}")
        if is_causal and q.shape[1] != k.shape[1]:
            raise UnsupportedError(f"is_causal with {q.shape[1]} queries and {k.shape[1]} keys: torch lets query i see key i, "
                                   "low-bit attention lets the last query see the last key")
        options = options_of(self.precision, "NHD", is_causal, scale, return_lse, "auto", None, self.fallback == "exact")
        if mask is None:
            out, lse, variant = run(q, k, v, options)
            return out, lse, f"{self.precision} ({variant.name})"
        reason = why_no_lengths(mask, k.shape[0], k.shape[1])
        if reason is not None:
            raise UnsupportedError(reason)
        select(request_of(q, k, v, options, None, torch_runtime), options.backend)  # before the host waits for the mask
        return _of_leading_keys(q, k, v, lengths_of(mask) if lengths is None else lengths, options)

    def _exact(self, record, q, k, v, mask, is_causal, scale, return_lse):
        if return_lse:
            if mask is not None or (is_causal and q.shape[1] != k.shape[1]):
                raise UnsupportedError(f"{self._caller(record)}: return_lse is not served with this mask, nor by exact "
                                       "attention: torch's has no LSE; pass return_lse=False")
            return exact_attend(q, k, v, is_causal, scale, True)
        return exact_attention(q, k, v, mask, is_causal, scale), None

    def _caller(self, record: Record | None) -> str:
        return f"diffusers' backend {self.name}" + (f", attention module {record.name!r}" if record is not None else "")


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
    return out, lse, f"{options.precision} ({variant.name}, leading keys)"


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool,
                    scale: float | None) -> torch.Tensor:
    """What diffusers' own backend "native" computes of [B, N, H, D] tensors, to the bit."""
    if mask is not None and tuple(mask.shape) == (q.shape[0], k.shape[1]):
        mask = mask[:, None, None, :]
    q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(0, 2, 1, 3)


ATTENTIONS = {name: DispatchedAttention(name, *choices) for name, choices in backend_names().items()}
"""By the backend's name."""
