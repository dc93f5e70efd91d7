"""`Attend`: the one type of attention that processors hold and wrappers compose over, and exact attention as one."""
from __future__ import annotations

from typing import Any, Protocol

from lowbit_video.kernels.variants import VARIANTS

from ..engine.checks import request_of
from ..engine.codes import AttentionCodes
from ..engine.codes_target import Target
from ..engine.options import AttentionOptions, options_of
from ..engine.run import run
from ..engine.select import select
from ..graph.tracing import traced_by_paddle, traced_by_torch
from ..runtime.detect import runtime_of

FASTER = next(variant for variant in VARIANTS if variant.name == "hopper-exact")
"""Measured to be faster than PyTorch's FlashAttention-2 and cuDNN (eval/speed/NOTES.md); Paddle's own was not in that run."""
FASTER_FROM = 4096
"""Keys from which FASTER is taken: cross attention to a text stays the framework's. Measured from 17776 on; the portable
kernel, slower there than FASTER, is ahead of the frameworks' FlashAttention-2 from 1024 on (eval/speed/results/sweep.md)."""


class Attend(Protocol):
    """Attention of [B, N, H, D] tensors: out shaped as q, or (out, lse float32 [B, H, N]) with return_lse.

    A wrapper takes one and gives one, so a processor never learns what is done around its attention (several GPUs, say).
    """

    def __call__(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
                 return_lse: bool = False) -> Any: ...


class CodedAttend(Protocol):
    """An `Attend` that also computes from codes, so that what is done around it can quantise first and send codes."""

    def options(self, is_causal: bool, scale: float | None, return_lse: bool) -> AttentionOptions:
        """The choices of a call."""

    def of_codes(self, codes: AttentionCodes, is_causal: bool = False, return_lse: bool = False, smoothed_lse: bool = False,
                 tokens_first: bool = True, target: Target | None = None) -> tuple[Any, Any]:
        """(out, lse [B, H, N] or None) of codes; the choices are those of `engine.codes.attend`."""


def coded(attend: Attend) -> CodedAttend | None:
    """The coded form of an attention: itself, or the processor whose method it is; None where it has none."""
    for candidate in (attend, getattr(attend, "__self__", None)):
        if getattr(candidate, "of_codes", None) is not None:
            return candidate
    return None


def exact_attend(q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
                 return_lse: bool = False) -> Any:
    """Exact attention of [B, N, H, D] tensors; with return_lse also the log-sum-exp [B, H, N].

    By the framework's own operator, but where that gives no LSE, aligns the mask otherwise or is slower than FASTER.
    """
    # frameworks align a causal mask with the first keys, this project with the last
    if return_lse or is_causal and q.shape[1] != k.shape[1]:
        out, lse, _ = run(q, k, v, options_of("exact", "NHD", is_causal, scale, return_lse, "auto", None))
        return (out, lse) if return_lse else out
    options = _faster(q, k, v, is_causal, scale)
    if options is not None:
        return run(q, k, v, options)[0]
    return runtime_of(q).exact_attention(q, k, v, is_causal=is_causal, scale=scale)


def _faster(q: Any, k: Any, v: Any, is_causal: bool, scale: float | None) -> AttentionOptions | None:
    """The choices of a call that goes to FASTER; None where it has gradients, is traced, is short or goes elsewhere."""
    if not FASTER.automatic or hasattr(scale, "data_ptr") or traced_by_torch(q) or traced_by_paddle(q):
        return None
    runtime = runtime_of(q)
    if runtime.is_cpu(q) or k.shape[1] < FASTER_FROM or runtime.wants_gradients(q, k, v):
        return None
    try:
        options = options_of("exact", "NHD", is_causal, scale, False, "auto", None)
        return options if select(request_of(q, k, v, options, None, runtime)) is FASTER else None
    except (TypeError, ValueError, RuntimeError):  # the framework's own attention serves it, or says itself what is wrong
        return None


def exact_attend_masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Exact attention of [B, N, H, D] tensors under a mask (see `frames.cogvideox`), scale D**-0.5.

    Raises ValueError for a mask whose shape does not fit.
    """
    batch, tokens, heads = q.shape[0], q.shape[1], q.shape[2]
    shape = list(mask.shape)
    wide = {2: [shape[0], 1, 1, shape[-1]], 3: [shape[0], 1, *shape[1:]]}.get(len(shape), shape)
    fits = len(wide) == 4 and all(size in (1, full) for size, full in zip(wide, (batch, heads, tokens, k.shape[1])))
    if not fits or wide[3] != k.shape[1]:
        raise ValueError(f"the attention mask has shape {shape}; with {batch} samples, {heads} heads and {tokens} tokens it "
                         f"must be [{batch}, {tokens}], [{batch}, {tokens}, {tokens}] or broadcast to "
                         f"[{batch}, {heads}, {tokens}, {tokens}]")
    return runtime_of(q).masked_attention(q, k, v, mask.reshape(wide))
