"""The frame of a module's own processor: its library's code runs as it is, and only torch's attention in it is served.

For the many blocks whose processors do as they like with projections, norms and positions and end in torch's
`scaled_dot_product_attention`: what they do around it needs no second telling. `apply` keeps the processor that it replaces.
"""
from __future__ import annotations

import inspect
from typing import Any

from ...engine.checks import request_of
from ...engine.select import select
from ...errors import UnsupportedError
from ...graph.tracing import traced_by_torch


def own_attention(processor: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
                  image_rotary_emb: Any = None, **others: Any) -> Any:
    """What the module's own processor computes and returns, its attention by `processor`; tensors and shapes are its own.

    What its attention asks for (a mask, a scale, heads shared by several queries) is served or refused by name. A mask under
    which each sample attends to its first keys is served at low bit, by their number; the processor is asked about any other.
    Each attention counts as a call: Mochi's processor runs one a sample of the batch.
    Raises UnsupportedError where its own processor is not known, for an argument that this one does not take, and where it ran
    no attention of torch's.
    """
    from ...runtime.torch_sdpa import Serving  # torch is here: these are its modules
    from .own_masks import Source

    own = checked(getattr(attn, "own_processor", None))
    given = _taken(own, {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask,
                         "image_rotary_emb": image_rotary_emb, **others})
    middle = _Middle(processor, attn, Source(attention_mask, type(own)))
    with Serving(middle.serve):
        out = own(attn, hidden_states, **given)
    if not middle.calls:
        raise UnsupportedError(f"{type(own).__name__} computes its attention without torch's scaled_dot_product_attention, so "
                               "none of it ran as asked; lowbit_video.remove(model), give the model a processor that uses it "
                               "(such as AttnProcessor2_0), and apply again")
    return out


def checked(own: Any) -> Any:
    """The processor, if it can be run by `own_attention`. own: of the module's library; None where it is not known.

    Raises UnsupportedError.
    """
    if own is None:
        raise UnsupportedError("this module's own processor does the work around its attention, and it is not known: set by "
                               "hand, ours replaced it; take lowbit_video.apply(model, ...), which keeps it")
    if hasattr(own, "parameters"):
        raise UnsupportedError(f"the module's own processor, {type(own).__name__}, has weights, which would be lost to the "
                               "model while it is replaced; take it off first (an IP adapter: pipe.unload_ip_adapter()), or "
                               "leave the module alone (modules={its name: None})")
    return own


def _taken(own: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a processor takes by name. Raises UnsupportedError for another that is not None.

    What only its **kwargs would take is refused too: diffusers never hands that on.
    """
    names = inspect.signature(own.__call__).parameters
    unknown = [name for name, value in given.items() if value is not None and name not in names]
    if unknown:
        raise UnsupportedError(f"the attention was called with {', '.join(unknown)}, which {type(own).__name__} does not take; "
                               f"it takes {', '.join(list(names)[1:])}; leave the argument out")
    return {name: value for name, value in given.items() if name in names}


class _Middle:
    """The attention of one call of a module's own processor. calls: how often it was asked for. masks: their Source."""

    def __init__(self, processor: Any, attn: Any, masks: Any) -> None:
        self._processor, self._attn, self._masks, self.calls = processor, attn, masks, 0

    def serve(self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
              scale: float | None = None, enable_gqa: bool = False) -> Any:
        """torch's `scaled_dot_product_attention`: q [B, H, Nq, D], k and v [B, Hkv, Nkv, D], a mask that broadcasts."""
        self.calls += 1
        if dropout_p:
            raise UnsupportedError(f"its processor asks for dropout_p={dropout_p}; attention here is for inference, without "
                                   "dropout; call model.eval()")
        if is_causal and (attn_mask is not None or query.shape[2] != key.shape[2]):
            raise UnsupportedError(f"its processor asks for is_causal=True with {query.shape[2]} queries, {key.shape[2]} keys "
                                   f"and {'a' if attn_mask is not None else 'no'} mask; causal attention here is that of as "
                                   "many queries as keys, without a mask")
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        asked: dict[str, Any] = {"is_causal": True} if is_causal else {}
        if scale is not None and abs(scale * q.shape[3] ** 0.5 - 1) > 1e-9:
            asked["scale"] = scale
        if attn_mask is None:
            return self._run(q, k, v, **asked).transpose(1, 2)
        mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        lengths = self._masks.lengths(mask) if self._serves(q, k, v) else None
        return self._masked(q, k, v, mask, lengths, asked).transpose(1, 2)

    def _masked(self, q: Any, k: Any, v: Any, mask: Any, lengths: tuple[int, ...] | None, asked: dict[str, Any]) -> Any:
        """By each sample's first keys, where there are lengths (one, or one a sample), else under the mask."""
        if lengths is None:
            if "scale" in asked:
                q = q * (asked["scale"] * q.shape[3] ** 0.5)
            return self._run(q, k, v, mask)
        if len(set(lengths)) == 1:
            return self._run(q, k[:, :lengths[0]], v[:, :lengths[0]], **asked)
        rows = (slice(i, i + 1) for i in range(len(lengths)))
        outs = [self._run(q[row], k[row, :n], v[row, :n], **asked) for row, n in zip(rows, lengths)]
        return self._attn.attention_slot.runtime.concat(outs, 0)

    def _run(self, *tensors: Any, **asked: Any) -> Any:
        if asked:
            return self._processor.run(self._attn, *tensors, **asked)
        return self._processor.attention_of(self._attn, *tensors)

    def _serves(self, q: Any, k: Any, v: Any) -> bool:
        """Whether a low-bit kernel would take the call without its mask: else nobody need wait to read that."""
        if not self._processor.low_bit or traced_by_torch(q):
            return False
        try:
            options = self._processor.options()
            select(request_of(q, k, v, options, None, self._attn.attention_slot.runtime), options.backend)
        except (UnsupportedError, TypeError):
            return False
        return True
