"""`apply()` and `remove()`: a model's attention hooked, and given back exactly as it was."""
from __future__ import annotations

import copy
import fnmatch
import weakref
from collections.abc import Mapping
from typing import Any

from ..arguments import shown, some_of
from ..errors import UnsupportedError
from ..precision import Precision
from ..rung import as_rung
from .base import NO_CONTEXT_PARALLEL, AttnProcessor, check_processor, set_processor, slot_of
from .frames.own import checked, own_attention
from .frames.replaced import check_replaced
from .order import warn_of_order
from .processors import LowBitAttnProcessor
from .recipe.clock import StepClock, clock_of
from .recipe.processor import RecipeAttnProcessor
from .recipe.recipe import Recipe
from .recipe.table import LayerPlan
from .report import attention_modules, dispatching_modules, named_modules, recipe_modules, transformer_of


class Applied:
    """What one `apply` changed; `remove()`, or leaving it as a context manager, takes it back. recipe: if one was applied."""

    def __init__(self, model: Any, recipe: Recipe | None = None) -> None:
        self._model, self.recipe = weakref.ref(model), recipe
        self._before: list[tuple[weakref.ref, Any]] = []
        self._placed: list[Any] = []
        self._clock: StepClock | None = None

    def _set(self, module: Any, processor: Any, own: Any = None) -> None:
        self._before.append((weakref.ref(module), module.processor))
        if own is not None:
            module.own_processor = own
        set_processor(module, processor)

    def _restore(self) -> None:
        for reference, processor in reversed(self._before):
            module = reference()
            if module is not None:
                set_processor(module, processor)
                if hasattr(module, "own_processor") and not isinstance(processor, AttnProcessor):
                    del module.own_processor
        self._before.clear()
        for placed in reversed(self._placed):
            placed.take_back()
        self._placed.clear()
        if self._clock is not None and self._model() is not None:
            self._clock.uninstall(self._model())
            self._clock = None

    def __deepcopy__(self, memo: dict) -> Applied:
        """What a copied model's `remove` takes back: copies of what its modules had. They have been copied before this."""
        model = self._model()
        if id(model) not in memo:
            return self
        twin = Applied(memo[id(model)], self.recipe)
        twin._clock = copy.deepcopy(self._clock, memo)
        twin._placed = [one for one in (placed.copied(memo) for placed in self._placed) if one is not None]
        for reference, processor in self._before:
            module = reference()
            if id(module) in memo:
                copied = memo[id(module)]
                twin._before.append((weakref.ref(copied), copy.deepcopy(processor, memo)))
                if isinstance(module.processor, AttnProcessor):
                    copied.processor.records.of(copied).name = module.processor.records.of(module).name
        return twin

    def remove(self) -> None:
        """Restore what was there before this `apply`, together with whatever was applied on top of it."""
        stack = getattr(self._model(), "lowbit_applied", ())
        while self in stack:
            stack.pop()._restore()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply(model_or_pipe: Any, precision: str | Precision | AttnProcessor | Recipe | None = "int8+fp16",
          modules: Mapping[str, str | Precision | AttnProcessor | None] | None = None, *, fallback: str | None = None,
          backend: str = "auto", check_finite: bool | None = None, fused_prologue: bool | None = None) -> Applied:
    """Hook a model's attention.

    model_or_pipe: a pipeline (only its transformer is touched) or a model, Paddle or torch; none whose tokens diffusers'
        `enable_parallelism` cut (UnsupportedError).
    precision: for every attention module, "int8+fp8" or with pooled keys "int8+fp8 pooled 0.3 always 226" (`Pooled`); or a
        Recipe, which has one for each layer, head and step, and which goes into models that ask diffusers' dispatcher too
        (Wan, HunyuanVideo, LTX, ...), where modules are rungs by their names; None leaves those alone that no pattern names.
    modules: name patterns (`fnmatch`) to a precision, a processor, or None for "leave alone";
        where several match a module the last one wins. "transformer_blocks.0.*": "fp16", ...
    fallback, backend, check_finite, fused_prologue: as in LowBitAttnProcessor.
    returns: a handle; `remove(model)` or `handle.remove()` restores exactly what was there.
    Warns where a recipe was calibrated with the tokens in another order than the model has them in (`order_tokens`).
    Raises TypeError for what is no model, precision or mapping, ValueError for a pattern that names no module or a model
    without attention modules, UnsupportedError for an attention class that no frame declares (`declare_attention`), a
    processor that a frame needs and cannot run, or one that does more than the frame in its place. No processor is changed
    then.
    """
    model = transformer_of(model_or_pipe)
    _check_whole(model)
    recipe = precision if isinstance(precision, Recipe) else None
    dispatched = recipe is not None and bool(dispatching_modules(model))
    targets = attention_modules(model) if recipe is None else recipe_modules(model)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no attention module that takes a processor (processor, to_q, ...)")
    if modules is not None and not isinstance(modules, Mapping):
        raise TypeError(f"modules is {shown(modules)}; give a dict of name patterns to precisions, such as "
                        "{'transformer_blocks.0.*': 'fp16'}")
    choice: dict[str, Any] = dict.fromkeys(targets, precision) if recipe is None else dict(recipe.resolve(model).layers)
    for pattern, wanted in (modules or {}).items():
        names = [name for name in targets if isinstance(pattern, str) and fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"the pattern {shown(pattern)} names no attention module; there are: {some_of(list(targets))}; "
                             "try a pattern such as 'transformer_blocks.0.*'")
        choice.update(dict.fromkeys(names, wanted))
    warn_of_order(recipe, model)
    handle = Applied(model, recipe)
    if dispatched:
        from .dispatcher.recipe import place

        handle._placed = place(model, targets, choice, fused_prologue, fallback=fallback, backend=backend,
                               check_finite=check_finite)
        return _done(handle, model_or_pipe, any(len(placed.attention.plan.spans) > 1 for placed in handle._placed))
    made: dict[Any, AttnProcessor] = {}

    def processor_for(wanted: Any) -> Any:
        if callable(wanted):
            check_processor(wanted)
            return wanted
        hook = {"fallback": fallback, "backend": backend, "check_finite": check_finite, "fused_prologue": fused_prologue}
        if isinstance(wanted, LayerPlan):
            make = lambda: RecipeAttnProcessor(wanted, clock_of(model), **hook)
        else:
            wanted = as_rung(wanted)
            make = lambda: LowBitAttnProcessor(wanted[0], pooled=wanted[1], **hook)
        if wanted not in made:
            made[wanted] = make()
        return made[wanted]

    processors = {name: processor_for(wanted) for name, wanted in choice.items() if wanted is not None}
    parts = {"": model, **dict(named_modules(model))}
    own = {}
    for name, processor in processors.items():
        if isinstance(processor, AttnProcessor):
            try:
                slot = slot_of(targets[name], targets[name].to_q.weight, owner=parts[name.rpartition(".")[0]])
                if slot.frame is own_attention:
                    own[name] = _own_of(targets[name])
                else:
                    check_replaced(slot.frame, targets[name].processor)
            except UnsupportedError as error:
                raise UnsupportedError(f"{name} of {type(model).__name__}: {error}{_dispatches(targets)}") from None
            processor.records.of(targets[name]).name = name
    for name, processor in processors.items():
        handle._set(targets[name], processor, own.get(name))
    return _done(handle, model_or_pipe, any(isinstance(processor, RecipeAttnProcessor) and len(processor.plan.spans) > 1
                                            for processor in made.values()))


def _done(handle: Applied, model_or_pipe: Any, steps: bool) -> Applied:
    """The handle, kept by its model. steps: whether some rule is for steps, so that timesteps are looked at."""
    model = transformer_of(model_or_pipe)
    if steps:
        handle._clock = clock_of(model)
        schedule = getattr(getattr(model_or_pipe, "scheduler", None), "config", None)
        handle._clock.install(model, getattr(schedule, "num_train_timesteps", None))
    if not hasattr(model, "lowbit_applied"):
        model.lowbit_applied = []  # on the model, so that a copy has one of its own
    model.lowbit_applied.append(handle)
    return handle


def remove(model_or_pipe: Any) -> bool:
    """Take back the latest `apply`: every module has again the very processor it had before.

    Nested applies come off one at a time; those of a copied model (copy.deepcopy) are its own. returns: whether there was
    something to take back. Raises UnsupportedError for a model whose tokens diffusers' `enable_parallelism` cut: what was there
    before does not exchange them.
    """
    model = transformer_of(model_or_pipe)
    stack = getattr(model, "lowbit_applied", None)
    if not stack:
        return False
    _check_whole(model)
    stack.pop()._restore()
    return True


def _check_whole(model: Any) -> None:
    """Raises UnsupportedError where diffusers cuts the model's tokens among ranks."""
    if getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None) is not None:
        raise UnsupportedError(NO_CONTEXT_PARALLEL)


def _own_of(module: Any) -> Any:
    """The processor of its library that the module has, or had before the hook that it has."""
    hooked = isinstance(module.processor, AttnProcessor)
    return checked(getattr(module, "own_processor", None) if hooked else module.processor)


def _dispatches(modules: Mapping[str, Any]) -> str:
    if not any(hasattr(module.processor, "_attention_backend") for module in modules.values()):
        return ""
    return ("; this model asks diffusers' dispatcher for its attention: take a backend of that in place of apply(), "
            "docs/diffusers.md, or give apply() a Recipe")
