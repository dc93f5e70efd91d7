"""`AttnProcessor`: what every processor does: a frame, an attention in its middle, and the book-keeping.

A processor is what an attention module calls for its whole work: projections, norms, positions, attention, output projection.
All but the attention is the frame's (`frames/`), chosen by the module's class; the attention is `attend`, of type `Attend`. The
code knows no framework, so the same processor serves our Paddle model and diffusers' torch modules.
"""
from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from lowbit_video.kernels.prologue.steps import Rest, Steps

from ..engine.prologue import joined
from ..errors import NonFiniteError, UnsupportedError
from ..graph.slots import Slot
from ..graph.tracing import traced_by_paddle, traced_by_torch
from . import prologue
from .frames import frame_of
from .frames.owners import live_modules
from .frames.prepared import prepared
from .prologue import Before
from .report import Record, Records

_active = threading.local()

NO_CONTEXT_PARALLEL = ("diffusers' enable_parallelism cuts the tokens among ranks and leaves it to the processors to exchange "
                       "them, which those of lowbit_video do for CogVideoX alone: apply first, then call "
                       "lowbit_video.parallelize(pipe) in its place (docs/parallel.md), or "
                       "model.enable_parallelism(config=..., cp_plan=lowbit_video.cp_plan(model))")


class AttnProcessor:
    """The frame of a module around an `attend`, and the book-keeping.

    Subclasses define `attend`. Wrappers (sequence parallel) stand in the module's slot, around whatever processor it has. One
    processor may serve any number of modules.

    records: what ran, per attention module. low_bit: whether the coverage report counts it as hooked. differentiable: whether
    `attend` may be asked for gradients; it may be by default, as it may be anything. fused_prologue: whether norms and
    positions are left to `attend` where a frame can leave them; None: if `prologue.FUSED_PROLOGUE`. always_apart: why they
    never are, in words, or "", or None; apart_in_graphs: that in a graph, which has one way for all calls.
    """

    low_bit, differentiable = False, True
    fused_prologue: bool | None = False
    always_apart: str | None = None
    apart_in_graphs: str | None = None

    def __init__(self) -> None:
        self.records = Records()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "attend" and (reason := why_never(value)):  # one of users' own in its place
            self.always_apart = self.apart_in_graphs = reason

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
                 image_rotary_emb: Any = None, *, temb: Any = None, scale: Any = None, rotary_emb: Any = None,
                 query_rotary_emb: Any = None, key_rotary_emb: Any = None, base_sequence_length: Any = None,
                 hidden_states_masks: Any = None, latent_attn_mask: Any = None, text_attn_mask: Any = None,
                 batch_flag: Any = None, ip_hidden_states: Any = None, ip_adapter_masks: Any = None, **others: Any) -> Any:
        """What the module's frame computes (see `frames`). others: what else the module's own protocol has.

        What processors of diffusers and ppdiffusers take besides stands here by name, for their `Attention` passes on only what
        it finds in a processor's signature; a frame takes or refuses each.

        Raises UnsupportedError for a module whose class no frame declares, and for an argument that its frame does not know.
        """
        if traced_by_torch(hidden_states):
            from ..graph import torch_ops

            torch_ops.once_a_compilation(make_slots)
        slot = slot_of(attn, hidden_states)
        others = {name: value for name, value in dict(
            others, image_rotary_emb=image_rotary_emb, temb=temb, scale=scale, rotary_emb=rotary_emb,
            query_rotary_emb=query_rotary_emb, key_rotary_emb=key_rotary_emb, base_sequence_length=base_sequence_length,
            hidden_states_masks=hidden_states_masks, latent_attn_mask=latent_attn_mask, text_attn_mask=text_attn_mask,
            batch_flag=batch_flag, ip_hidden_states=ip_hidden_states, ip_adapter_masks=ip_adapter_masks,
        ).items() if value is not None}
        slot.check_names(others)
        return slot.frame(self, attn, hidden_states, encoder_hidden_states, attention_mask, **others)

    @property
    def _parallel_config(self) -> None:
        """Where diffusers' `enable_parallelism` tells processors that tokens are cut; without it, it would not tell ours."""
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        slots = [getattr(module, "attention_slot", None) for module in live_modules()
                 if module.__dict__.get("processor") is self]
        if any(slot is None or slot.shared_by is None for slot in slots):
            raise UnsupportedError(NO_CONTEXT_PARALLEL)
        for slot in slots:
            slot.around = slot.around or slot.shared_by(config)

    def attention_of(self, attn: Any, q: Any, k: Any, v: Any, mask: Any = None, apart: str = "") -> Any:
        """Attention for one module, [B, N, H, D] in and out: at once, or as an operator of a graph that is traced.

        apart: why norms and positions were computed before it where they were to be fused, for the report.
        """
        if not self._is_traced(attn, q):
            return self.run(attn, q, k, v, mask, apart=apart)
        slot = attn.attention_slot
        return slot.operators.attention_of_module(attn, q, k, v, mask, slot.key, apart)

    def attention_behind(self, attn: Any, q: Any, k: Any, v: Any, mask: Any, prepare: Callable[[Any, Any], tuple[Any, Any]],
                         steps: Callable[[], Steps | str], rest: Rest | None = None) -> Any:
        """The same of q and k as their projections left them: behind `prepare(q, k)`, or, where that is asked for and can be,
        in the same readings as quantisation. steps: that as `hook.prologue` has it. rest: q, k and v of the tokens behind
        theirs, from a frame that asked `takes_pieces`."""
        traced, runtime = self._is_traced(attn, q), attn.attention_slot.runtime
        reason = self.why_apart(attn, mask, traced) if self._fuses() else ""
        found = steps() if reason is None or self._fuses() and not traced else reason
        if isinstance(found, str):
            reason = found if reason is None else reason
        elif not traced:
            prepare = functools.partial(prologue.by_kernel, runtime, found, prepare)
        if reason is not None:
            q, k, v = joined(q, k, v, Steps(rest=rest), "NHD", runtime)
            return self.attention_of(attn, *prepare(q, k), v, mask, reason)
        before = Before(found._replace(rest=rest), prepare)
        if not traced:
            return self.run(attn, q, k, v, before=before)
        slot = attn.attention_slot
        return slot.operators.attention_behind_steps(attn, q, k, v, before, slot.key)

    def takes_pieces(self, attn: Any, mask: Any, like: Any) -> bool:
        """Whether `attention_behind` reads q, k and v of two streams of tokens as they lie, for a call on tensors as `like`."""
        return False

    def _fuses(self) -> bool:
        return prologue.FUSED_PROLOGUE if self.fused_prologue is None else self.fused_prologue

    def why_apart(self, attn: Any, mask: Any, traced: bool) -> str | None:
        """Why norms and positions come before all that is done to q, k and v here: in words, or "", or None if they do not.

        traced: whether a graph is made of this call.
        """
        if mask is not None:
            return "a mask was given"
        if attn.attention_slot.around is not None:
            return "the tokens are shared by several ranks"
        return self.apart_in_graphs if traced else self.always_apart

    def _is_traced(self, attn: Any, q: Any) -> bool:
        """Whether a graph is made of this call, whose operators run what processor the module has then."""
        return attn.processor is self and (traced_by_torch(q) or traced_by_paddle(q))

    def run(self, attn: Any, q: Any, k: Any, v: Any, mask: Any = None, *, apart: str = "", **asked: Any) -> Any:
        """Attention for one module, counted in its record: [B, N, H, D] in and out.

        apart: as `attention_of`. asked: of `attend`, if no mask.
        """
        outer, _active.record = getattr(_active, "record", None), self.records.of(attn)
        around = attn.attention_slot.around
        try:
            with prologue.apart(apart):
                if mask is None:
                    return (self.attend if around is None else around(self.attend))(q, k, v, **asked)
                if around is not None:
                    raise UnsupportedError(f"an attention mask of shape {list(mask.shape)} was given, and the tokens are "
                                           "shared by several ranks, none of which has the mask's whole rows; pass no mask, or "
                                           "share guidance alone (cfg=2, ulysses=1, ring=1)")
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

    def note(self, variant: str, reason: str = "", tiles: tuple[int, int] | None = None) -> None:
        """Count one call for the module that is running, as `Record.note`; outside a module it is a no-op."""
        record = getattr(_active, "record", None)
        if record is not None:
            record.note(variant, reason, tiles)

    def __str__(self) -> str:
        return type(self).__name__

    __repr__ = __str__


def why_never(attend: Callable) -> str | None:
    """Why an attention never gets norms and positions as `before`, or None if it takes them."""
    return None if "before" in inspect.signature(attend).parameters else "this attend takes no norms and positions"


def check_processor(processor: Any) -> None:
    """Raises TypeError for what cannot be a module's processor, such as a processor's class in place of an instance."""
    if isinstance(processor, type):
        raise TypeError(f"an attention processor must be an instance, got the class {processor.__name__}; try "
                        f"{processor.__name__}()")
    if not callable(processor):
        raise TypeError(f"an attention processor must be callable, got {type(processor).__name__}")


def set_processor(module: Any, processor: Any) -> None:
    """Gives a module its processor."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # diffusers' MochiAttention
        module.processor = processor


def _run_module(attn: Any, *tensors: Any, steps: Steps | None = None, apart: str = "") -> Any:
    """The attention of a module by the processor that it has now: what its operator in a graph runs.

    steps: what q and k still lack. apart: as `AttnProcessor.attention_of`.
    """
    if not isinstance(attn.processor, AttnProcessor):
        raise TypeError(f"this graph was compiled with a lowbit_video processor and cannot run "
                        f"{type(attn.processor).__name__}; compile the model again")
    if steps is None:
        return attn.processor.run(attn, *tensors, apart=apart)
    runtime, asked = attn.attention_slot.runtime, attn.processor.fused_prologue is not False
    prepare = functools.partial(prepared, runtime, steps)
    if asked:
        prepare = functools.partial(prologue.by_kernel, runtime, steps, prepare)
    never = attn.processor.always_apart if asked else ""
    if never is not None:  # set since the graph was made
        q, k, *rest = tensors
        return attn.processor.run(attn, *prepare(q, k), *rest, apart=never)
    return attn.processor.run(attn, *tensors, before=Before(steps, prepare))


def slot_of(attn: Any, like: Any, owner: Any = None) -> Slot:
    """The module's slot, made for tensors of `like`'s framework when first asked for. owner: as `frames.frame_of`."""
    slot = getattr(attn, "attention_slot", None)
    if slot is None:
        slot = attn.attention_slot = Slot(attn, like, frame_of(attn, owner), _run_module)
    return slot


def make_slots() -> None:
    """Makes the missing slots of all live modules that have a processor of this project, as one set by hand leaves them.

    Of all, because torch.compile guards a graph by what it saw: were the traced module's slot alone made, a block alike would
    be compiled again for the lack of its own.
    """
    for module in live_modules():
        if isinstance(module.__dict__.get("processor"), AttnProcessor) and getattr(module, "attention_slot", None) is None:
            try:
                slot_of(module, module.to_q.weight)
            except UnsupportedError:
                pass  # a call of that module says so, if there is one


def _describe(attn: Any, record: Record) -> str:
    own = getattr(attn, "full_name", type(attn).__name__.lower)()
    return f"attention module {record.name or own!r}"
