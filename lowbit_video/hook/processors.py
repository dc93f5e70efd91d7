"""The processors: attention at low bit, and exact attention. What surrounds the attention is in `base` and `frames`."""
from __future__ import annotations

from typing import Any

from ..arguments import flag, shown
from ..engine.codes import AttentionCodes
from ..engine.codes import attend as attend_codes
from ..engine.codes_target import Target
from ..engine.options import AttentionOptions, options_of
from ..engine.packing import Packing
from ..engine.prologue import joined, why_not_chosen
from ..engine.run import run
from ..errors import UnsupportedError
from ..graph.tracing import traced_by_torch
from ..pooled import Pooled
from ..precision import Precision
from ..rung import as_rung
from ..runtime.detect import runtime_of
from . import prologue
from .attend import exact_attend, exact_attend_masked
from .base import AttnProcessor, why_never
from .masks import packed, prefix_lengths
from .prologue import Before, apart, apart_text

DTYPES = ("float16", "bfloat16", "float32")
"""Tensor dtypes that low-bit attention takes."""


class ExactAttnProcessor(AttnProcessor):
    """Full-precision attention by the framework's own operator, or by Hopper's exact kernel from 4096 keys on; the pipelines'
    default."""

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        """Exact attention; masks are served as well."""
        self.note("exact")
        return exact_attend(q, k, v, is_causal, scale, return_lse)

    def attend_masked(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """Exact attention under the mask."""
        self.note("exact (masked)")
        return exact_attend_masked(q, k, v, mask)


class LowBitAttnProcessor(AttnProcessor):
    """Attention at low bit, inference only: where gradients are asked for, an error or, with the fallback, exact attention.

    precision: a string such as "int8+fp16", or a Precision; or a rung with pooled keys, "int8+fp8 pooled 0.3 always 226".
    fallback: None makes whatever no kernel variant serves (a mask, a dtype, a head dim) an
        UnsupportedError; "exact" runs exact attention instead and records why, also where exact
        attention is measured to be faster.
    backend: "auto", "reference", "triton" or "hopper"; see `lowbit_video.attention`.
    check_finite: look for NaN and infinity in q, k, v first; None means on CPU tensors only.
    pooled: a `Pooled`, which keeps a share of the keys and pools the rest; a ring of ranks refuses it.
    fused_prologue: compute QK norm and rotary positions in the same readings of q and k as quantisation, where that is served
        (CogVideoX's blocks, compiled or not); elsewhere they are computed apart, and the report says why. None:
        `hook.prologue.FUSED_PROLOGUE`.
    Raises ValueError or TypeError for a precision, fallback, backend, check_finite or pooled that does not exist.
    """

    low_bit = True

    def __init__(self, precision: str | Precision = "int8+fp16", *, fallback: str | None = None, backend: str = "auto",
                 check_finite: bool | None = None, pooled: Pooled | None = None, fused_prologue: bool | None = None) -> None:
        super().__init__()
        self.precision, self.pooled = as_rung(precision, pooled)
        if fallback is not None and not (isinstance(fallback, str) and fallback == "exact"):
            raise ValueError(f"unknown fallback {shown(fallback)}; there are: None (an error says why) and 'exact'")
        self.fallback, self.backend, self.check_finite = fallback, backend, check_finite
        self.fused_prologue = None if fused_prologue is None else flag("fused_prologue", fused_prologue)
        self.low_bit, self.differentiable = not self.precision.exact, fallback == "exact"
        self.pools = self.options().pools is not None  # raises for a backend or a check_finite that does not exist
        never = "" if self.precision.exact else why_never(self.attend) or why_not_chosen(self.precision, self.pools)
        self.always_apart = self.apart_in_graphs = never

    def takes_pieces(self, attn: Any, mask: Any, like: Any) -> bool:
        """Where `TWO_PIECES` says so, for what is fused and has V in FP8; a graph's compiler concatenates for nothing.

        Not where what computes q, k and v has hooks, which would run for each stream: offloading would bring weights twice.
        """
        return (prologue.TWO_PIECES and self._fuses() and self.precision.pv == "fp8" and not self._is_traced(attn, like) and
                self.why_apart(attn, mask, False) is None and
                not any(prologue.has_hooks(module) for module in (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
                        if module is not None))

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False, before: Before | None = None) -> Any:
        """Attention at this processor's precision, or exact attention where `fallback` allows.

        before: norms and positions that q and k still lack.
        """
        if before is not None and self.precision.exact:
            q, k = before.prepare(q, k)
        elif before is not None:
            return self._fused(q, k, v, self.options(is_causal, scale, return_lse), before)
        served = self._low_bit(q, k, v, self.options(is_causal, scale, return_lse))
        if served is None:
            return exact_attend(q, k, v, is_causal, scale, return_lse)
        return served if return_lse else served[0]

    def _fused(self, q: Any, k: Any, v: Any, options: AttentionOptions, before: Before) -> Any:
        """Attention of q and k that lack what is before it; apart where it is not served."""
        try:
            out, lse, variant = run(q, k, v, options, steps=before.steps)
        except UnsupportedError as error:  # where nothing serves the call at all, the same call apart says so
            q, k, v = joined(q, k, v, before.steps, "NHD", runtime_of(q))
            with apart(getattr(error, "reason", "no kernel serves the call")):
                return self.attend(*before.prepare(q, k), v, options.is_causal, options.scale, options.return_lse)
        pieces = "" if before.steps.rest is None else " of two pieces"
        self.note(f"{self._what()} ({variant.name}, fused prologue{pieces})")
        return (out, lse) if options.return_lse else out

    def _low_bit(self, q: Any, k: Any, v: Any, options: AttentionOptions, packing: Packing | None = None) -> tuple | None:
        """(out, lse), noted; None, noted with the reason, where no kernel serves and `fallback` allows exact attention."""
        try:
            dtype = runtime_of(q).dtype_name(q)
            if dtype not in DTYPES:
                raise UnsupportedError(f"the tensors have dtype {dtype}; low-bit attention takes {', '.join(DTYPES)}; "
                                       "cast the model, or use fallback='exact'")
            out, lse, variant = run(q, k, v, options, packing)
        except UnsupportedError as error:
            if self.fallback is None:
                raise
            self.note("exact", reason_of(error))
            return None
        tiles = None
        if self.pools:
            batch, tokens, heads, head_dim = map(int, q.shape)
            tiles = self.pooled.tiles(batch, heads, tokens, int(k.shape[1]), head_dim)
        self.note(f"{self._what()} ({variant.name}{apart_text()})", tiles=tiles)
        return out, lse

    def _what(self) -> str:
        return f"{self.precision} {self.pooled}" if self.pools else str(self.precision)

    def options(self, is_causal: bool = False, scale: float | None = None, return_lse: bool = False) -> AttentionOptions:
        """The choices of a call of this processor."""
        return options_of(self.precision, "NHD", is_causal, scale, return_lse, self.backend, self.check_finite,
                          self.fallback == "exact", self.pooled)

    def of_codes(self, codes: AttentionCodes, is_causal: bool = False, return_lse: bool = False, smoothed_lse: bool = False,
                 tokens_first: bool = True, target: Target | None = None) -> tuple[Any, Any]:
        """(out, lse [B, H, N] or None) of tensors that are codes already; the choices are those of `engine.codes.attend`."""
        out, lse, variant = attend_codes(codes, runtime_of(codes.q.memory), is_causal=is_causal, return_lse=return_lse,
                                         backend=self.backend, smoothed_lse=smoothed_lse, tokens_first=tokens_first,
                                         target=target)
        self.note(f"{codes.options.precision} ({variant.name})")
        return out, lse

    def attend_masked(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """Under a mask that hides each sample's last keys: by their lengths. Else exact attention where `fallback` allows."""
        traced = traced_by_torch(q)
        lengths = None if traced else prefix_lengths(mask, q.shape[0], k.shape[1])
        if lengths is None:
            reason = ("torch.compile traces this call, and a mask is read to be served" if traced else
                      "no low-bit kernel takes a mask that hides other keys than each sample's last")
            if self.fallback is None:
                raise UnsupportedError(f"an attention mask of shape {list(mask.shape)} was given to {self}: {reason}; try a "
                                       "processor with fallback='exact', or pass no mask")
            self.note("exact (masked)", f"{reason}; one of shape {list(mask.shape)} was given")
        elif len(set(lengths)) == 1:
            return self.attend(q, k[:, :lengths[0]], v[:, :lengths[0]])
        else:
            q3, k3, v3, packing = packed(q, k, v, lengths)
            served = self._low_bit(q3, k3, v3, self.options(), packing)
            if served is not None:
                return served[0].reshape(q.shape)
        return exact_attend_masked(q, k, v, mask)

    def __str__(self) -> str:
        options = [self._what()]
        if self.fallback:
            options.append(f"fallback={self.fallback}")
        if self.backend != "auto":
            options.append(f"backend={self.backend}")
        if self.fused_prologue is not None:
            options.append(f"fused_prologue={self.fused_prologue}")
        return f"{type(self).__name__}({', '.join(options)})"

    __repr__ = __str__


def reason_of(error: UnsupportedError) -> str:
    """One line of why no variant fits: the reasons of those that come nearest."""
    title, *lines = str(error).splitlines()
    reasons = dict.fromkeys(line.partition(": ")[2] for line in lines if line.startswith("  "))
    near = [reason for reason in reasons if "needs an NVIDIA GPU" not in reason and "not among its formats" not in reason]
    return "; ".join(near or reasons or [title])
