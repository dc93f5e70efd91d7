"""Attention processors: the hook through which a model's attention runs at low bit.

A processor is what a CogVideoX `Attention` module calls for its whole attention: projections, QK norm,
rotary embedding, attention, output projection. Only the attention in the middle differs between
processors, and it has one type everywhere: `attend(q, k, v, is_causal=False, scale=None,
return_lse=False)` on [B, N, H, D] tensors. The code knows no framework, so the same processor serves
our Paddle model and diffusers' torch modules.
"""
from __future__ import annotations

import fnmatch
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from ..errors import NonFiniteError, UnsupportedError
from ..precision import Precision, as_precision
from ..runtime.detect import runtime_of
from .report import Record, Records, attention_modules, coverage, transformer_of

__all__ = ["Applied", "AttnProcessor", "ExactAttnProcessor", "LowBitAttnProcessor", "apply", "coverage", "remove"]

_active = threading.local()
DTYPES = ("float16", "bfloat16", "float32")
"""Tensor dtypes that low-bit attention takes."""


class AttnProcessor:
    """The frame of all processors: everything but the attention itself, and the book-keeping.

    Subclasses define `attend`. Wrappers (sequence parallel) may replace `processor.attend` by a
    function of the same type. One processor may serve any number of modules.

    records: what ran, per attention module. low_bit: whether the coverage report counts it as hooked.
    """

    low_bit = False

    def __init__(self) -> None:
        self.records = Records()

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any = None,
                 image_rotary_emb: Any = None) -> tuple[Any, Any]:
        """Joint attention of text and video tokens.

        attn: the module; has heads, to_q, to_k, to_v, norm_q, norm_k (may be None), to_out.
        hidden_states: video tokens [B, N_video, C]. encoder_hidden_states: text tokens [B, N_text, C].
        attention_mask: None, or additive (float) or True-means-attend (bool), of shape [B, N], [B, N, N]
            or [B, H or 1, N or 1, N] with N = N_text + N_video, text first.
        image_rotary_emb: None or (cos, sin), each [N_video, D], for the video tokens.
        returns: video tokens and text tokens, in this order, shaped like the inputs.
        """
        slot = slot_of(attn, hidden_states)
        runtime = slot.runtime
        text_tokens = encoder_hidden_states.shape[1]
        joint = runtime.concat([encoder_hidden_states, hidden_states], 1)
        batch, tokens = joint.shape[0], joint.shape[1]
        q = attn.to_q(joint).reshape([batch, tokens, attn.heads, -1])
        k = attn.to_k(joint).reshape([batch, tokens, attn.heads, -1])
        v = attn.to_v(joint).reshape([batch, tokens, attn.heads, -1])
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if image_rotary_emb is not None:
            q = _rotate_video(runtime, q, text_tokens, image_rotary_emb)
            k = _rotate_video(runtime, k, text_tokens, image_rotary_emb)
        if slot.operator is None or attn.processor is not self:
            out = self.run(attn, q, k, v, attention_mask)
        elif attention_mask is None:
            out = slot.operator(q, k, v, slot.key)
        else:
            out = slot.masked_operator(q, k, v, attention_mask, slot.key)
        out = attn.to_out[0](out.reshape([batch, tokens, -1]))
        out = attn.to_out[1](out)
        return out[:, text_tokens:], out[:, :text_tokens]

    def run(self, attn: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        """Attention for one module, counted in its record: [B, N, H, D] in and out."""
        outer, _active.record = getattr(_active, "record", None), self.records.of(attn)
        try:
            if mask is None:
                return self.attend(q, k, v)
            return self.attend_masked(q, k, v, mask)
        except (UnsupportedError, NonFiniteError) as error:
            raise type(error)(f"{_describe(attn, _active.record)}: {error}") from error
        finally:
            _active.record = outer

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        """Attention of [B, N, H, D] tensors: out, or (out, lse [B, H, N]) with return_lse."""
        raise NotImplementedError

    def attend_masked(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """Attention under a mask; a processor that cannot serve masks refuses, it never drops them."""
        raise UnsupportedError(f"an attention mask of shape {list(mask.shape)} was given; {self} supports no mask; "
                               "try a processor with fallback='exact', or pass no mask")

    def note(self, variant: str, reason: str = "") -> None:
        """Count one call for the module that is running; outside a module nothing is counted."""
        record = getattr(_active, "record", None)
        if record is not None:
            record.note(variant, reason)

    def __str__(self) -> str:
        return type(self).__name__

    __repr__ = __str__


class ExactAttnProcessor(AttnProcessor):
    """Full-precision attention by the framework's own operator; the pipelines' default."""

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
    """Attention at low bit, for inference: nothing is differentiated through it.

    precision: a string such as "int8+fp16", or a Precision.
    fallback: None makes whatever no kernel variant serves (a mask, a dtype, a head dim) an
        UnsupportedError; "exact" runs exact attention instead and records why, also where exact
        attention is measured to be faster.
    backend: "auto", "reference", "triton" or "hopper"; see `lowbit_video.attention`.
    check_finite: look for NaN and infinity in q, k, v first; None means on CPU tensors only.
    Raises ValueError for an unknown precision or fallback.
    """

    low_bit = True

    def __init__(self, precision: str | Precision = "int8+fp16", *, fallback: str | None = None, backend: str = "auto",
                 check_finite: bool | None = None) -> None:
        super().__init__()
        self.precision = as_precision(precision)
        if fallback not in (None, "exact"):
            raise ValueError(f"unknown fallback {fallback!r}; there are: None (an error says why) and 'exact'")
        self.fallback, self.backend, self.check_finite = fallback, backend, check_finite
        self.low_bit = not self.precision.exact

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        """Attention at this processor's precision, or exact attention where `fallback` allows."""
        from ..api import run

        try:
            dtype = runtime_of(q).dtype_name(q)
            if dtype not in DTYPES:
                raise UnsupportedError(f"the tensors have dtype {dtype}; low-bit attention takes {', '.join(DTYPES)}; "
                                       "cast the model, or use fallback='exact'")
            out, lse, variant = run(q, k, v, self.precision, tensor_layout="NHD", is_causal=is_causal, scale=scale,
                                    return_lse=return_lse, backend=self.backend, check_finite=self.check_finite,
                                    only_if_faster=self.fallback == "exact")
        except UnsupportedError as error:
            if self.fallback is None:
                raise
            self.note("exact", _reason(error))
            return exact_attend(q, k, v, is_causal, scale, return_lse)
        self.note(f"{self.precision} ({variant.name})")
        return (out, lse) if return_lse else out

    def attend_masked(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """No low-bit kernel takes a mask: exact attention if the caller asked for the fallback, else an error."""
        if self.fallback is None:
            return super().attend_masked(q, k, v, mask)
        self.note("exact (masked)", f"no low-bit kernel takes a mask; one of shape {list(mask.shape)} was given")
        return exact_attend_masked(q, k, v, mask)

    def __str__(self) -> str:
        options = [str(self.precision)]
        if self.fallback:
            options.append(f"fallback={self.fallback}")
        if self.backend != "auto":
            options.append(f"backend={self.backend}")
        return f"{type(self).__name__}({', '.join(options)})"

    __repr__ = __str__


class Slot:
    """What an attention module's processors find ready on it, so that a compiler can trace through them.

    runtime: of the module's tensors. operator, masked_operator, key: with Paddle, the operators that
    stand for the attention in a static graph and the number by which they know this module. They run
    whichever processor the module has then.
    """

    def __init__(self, attn: Any, like: Any) -> None:
        self.runtime = runtime_of(like)
        self.operator = self.masked_operator = self.key = None
        if self.runtime.NAME == "paddle":
            from ..graph import slots

            reference = weakref.ref(attn)

            def run(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
                module = reference()
                if not isinstance(module.processor, AttnProcessor):
                    raise TypeError(f"this graph was compiled with a lowbit_video processor and cannot run "
                                    f"{type(module.processor).__name__}; compile the model again")
                return module.processor.run(module, q, k, v, mask)

            self._runner = slots.Runner(run)
            self.operator, self.masked_operator = slots.attention_op, slots.masked_attention_op
            self.key = self._runner.key

    def __reduce__(self) -> tuple:
        # A copied module must not answer to the original's key: its copy of the slot is None, and it makes its own.
        return type(None), ()


def slot_of(attn: Any, like: Any) -> Slot:
    """The module's slot, made for tensors of `like`'s framework when first asked for."""
    slot = getattr(attn, "attention_slot", None)
    if slot is None:
        slot = attn.attention_slot = Slot(attn, like)
    return slot


def exact_attend(q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
                 return_lse: bool = False) -> Any:
    """Exact attention of [B, N, H, D] tensors; with return_lse also the log-sum-exp [B, H, N]."""
    if return_lse:
        from ..api import attention

        return attention(q, k, v, "exact", tensor_layout="NHD", is_causal=is_causal, scale=scale, return_lse=True)
    return runtime_of(q).exact_attention(q, k, v, is_causal=is_causal, scale=scale)


def exact_attend_masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Exact attention of [B, N, H, D] tensors under a mask (see `AttnProcessor.__call__`), scale D**-0.5.

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


def _rotate_video(runtime: Any, x: Any, text_tokens: int, rotary: tuple[Any, Any]) -> Any:
    """Rotary embedding of the video tokens of x [B, N, H, D]; the text tokens stay.

    Pairs are interleaved: (x0, x1) becomes (x0 cos - x1 sin, x1 cos + x0 sin), in float32.
    """
    cos, sin = rotary
    text, video = x[:, :text_tokens], x[:, text_tokens:]
    wide = video.float()
    pairs = wide.reshape([*wide.shape[:3], -1, 2])
    turned = runtime.concat([-pairs[..., 1:], pairs[..., :1]], -1).reshape(wide.shape)
    rotated = wide * cos.reshape([1, cos.shape[0], 1, cos.shape[1]]) + turned * sin.reshape([1, sin.shape[0], 1, sin.shape[1]])
    return runtime.concat([text, rotated.to(x.dtype)], 1)


def _reason(error: UnsupportedError) -> str:
    """One line of why no variant fits: the reasons of those that come nearest."""
    title, *lines = str(error).splitlines()
    reasons = dict.fromkeys(line.partition(": ")[2] for line in lines if line.startswith("  "))
    near = [reason for reason in reasons if "needs an NVIDIA GPU" not in reason and "not among its formats" not in reason]
    return "; ".join(near or reasons or [title])


def _describe(attn: Any, record: Record) -> str:
    own = getattr(attn, "full_name", type(attn).__name__.lower)()
    return f"attention module {record.name or own!r}"


class Applied:
    """What one `apply` changed; `remove()`, or leaving it as a context manager, takes it back."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._before: list[tuple[weakref.ref, Any]] = []

    def _set(self, module: Any, processor: Any) -> None:
        self._before.append((weakref.ref(module), module.processor))
        module.set_processor(processor)

    def _restore(self) -> None:
        for reference, processor in reversed(self._before):
            module = reference()
            if module is not None:
                module.set_processor(processor)
        self._before.clear()

    def remove(self) -> None:
        """Restore what was there before this `apply`, together with whatever was applied on top of it."""
        model = self._model()
        stack = _applied.get(model, []) if model is not None else []
        while self in stack:
            stack.pop()._restore()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


_applied: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def apply(model_or_pipe: Any, precision: str | Precision | AttnProcessor | None = "int8+fp16",
          modules: Mapping[str, str | Precision | AttnProcessor | None] | None = None, *, fallback: str | None = None,
          backend: str = "auto", check_finite: bool | None = None) -> Applied:
    """Hook a model's attention.

    model_or_pipe: a pipeline (only its transformer is touched) or a model, Paddle or torch.
    precision: for every attention module; None leaves those alone that no pattern names.
    modules: name patterns (`fnmatch`) to a precision, a processor, or None for "leave alone";
        where several match a module the last one wins. "transformer_blocks.0.*": "fp16", ...
    fallback, backend, check_finite: as in LowBitAttnProcessor.
    returns: a handle; `remove(model)` or `handle.remove()` restores exactly what was there.
    Raises ValueError for a pattern that names no module or a model without attention modules; nothing
    is changed then.
    """
    model = transformer_of(model_or_pipe)
    targets = attention_modules(model)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no attention module that takes a processor (set_processor, to_q, ...)")
    choice: dict[str, Any] = dict.fromkeys(targets, precision)
    for pattern, wanted in (modules or {}).items():
        names = [name for name in targets if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"the pattern {pattern!r} names no attention module; there are: {_some(list(targets))}; "
                             "try a pattern such as 'transformer_blocks.0.*'")
        choice.update(dict.fromkeys(names, wanted))
    made: dict[Any, AttnProcessor] = {}

    def processor_for(wanted: Any) -> Any:
        if callable(wanted):
            return wanted
        wanted = as_precision(wanted)
        if wanted not in made:
            made[wanted] = LowBitAttnProcessor(wanted, fallback=fallback, backend=backend, check_finite=check_finite)
        return made[wanted]

    processors = {name: processor_for(wanted) for name, wanted in choice.items() if wanted is not None}
    handle = Applied(model)
    for name, processor in processors.items():
        handle._set(targets[name], processor)
        if isinstance(processor, AttnProcessor):
            processor.records.of(targets[name]).name = name
            slot_of(targets[name], targets[name].to_q.weight)
    _applied.setdefault(model, []).append(handle)
    return handle


def remove(model_or_pipe: Any) -> bool:
    """Take back the latest `apply`: every module has again the very processor it had before.

    Nested applies come off one at a time. returns: whether there was something to take back.
    """
    stack = _applied.get(transformer_of(model_or_pipe))
    if not stack:
        return False
    stack.pop()._restore()
    return True


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
