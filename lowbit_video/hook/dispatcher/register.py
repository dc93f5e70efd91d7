"""`register_diffusers()` and `unregister_diffusers()`: low-bit attention under names that diffusers' dispatcher knows."""
from __future__ import annotations

import gc
import os
from typing import Any

from ...errors import UnsupportedError
from ..report import dispatching_modules, models_of
from . import registry
from .names import RECIPE, backend_names

_before: list[Any] = []
"""The backend that was active in the process before ours were known, once they are."""


def register_diffusers(*models_or_pipes: Any) -> tuple[str, ...]:
    """Makes low-bit attention known to diffusers: to `model.set_attention_backend("lowbit_int8_fp8")`, `attention_backend(...)`
    and DIFFUSERS_ATTN_BACKEND, which diffusers reads when a model's class is first imported: call this before.

    models_or_pipes: pipelines (their transformer and transformer_2 are meant) or models whose calls are to be counted for
        `coverage`; none: the names alone.
    returns: the names of the backends. One that ends in "_strict" raises where its namesake runs exact attention and says why.

    Does nothing for what is done already. `unregister_diffusers` takes it back.
    Raises ImportError without diffusers; UnsupportedError for a diffusers whose dispatcher is not known here, and for a model
    whose attention bypasses the dispatcher, so that `set_attention_backend` does nothing to it. Nothing is changed then.
    """
    models = [model for one in models_or_pipes for model in models_of(one).values()]
    for model in models:
        if not dispatching_modules(model):
            raise UnsupportedError(f"no attention of {type(model).__name__} goes through diffusers' dispatcher: "
                                   "set_attention_backend would do nothing to it, and change every other model; "
                                   "try lowbit_video.apply(model)")
    names = backend_names()
    dispatch = registry.dispatch_module(names)
    registry.check_layout(dispatch)
    from .backend import backend_function
    from .watch import Watched

    registry.add(dispatch, {name: backend_function(name) for name in (*names, RECIPE)})
    if not _before:
        _before.append(dispatch._AttentionBackendRegistry._active_backend)
        wanted = os.environ.get("DIFFUSERS_ATTN_BACKEND")
        if wanted in names:
            dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName(wanted))
    for model in models:
        for name, module in dispatching_modules(model).items():
            if getattr(module, "attention_calls", None) is None:
                Watched(module, name)
    return tuple(names)


def unregister_diffusers(*models_or_pipes: Any) -> None:
    """Takes `register_diffusers` back, and recipes that `apply` gave to these models.

    models_or_pipes: counted no more; where their attention has one of these backends, it gets the one that it had before.
        None given: this for all, the names are gone, and the process has the active backend of before.
    Raises ValueError where a model that was not given to `register_diffusers` still has one of these backends.
    """
    if not _before:
        return
    from .watch import watched_modules

    names, dispatch = (*backend_names(), RECIPE), registry.dispatch_module(())
    modules = watched_modules()
    if models_or_pipes:
        given = [module for one in models_or_pipes for model in models_of(one).values()
                 for module in dispatching_modules(model).values()]
        modules = [module for module in modules if any(module is one for one in given)]
    else:
        _refuse_users(names, modules)
    for module in modules:
        if module.processor._attention_backend in names:
            module.processor._attention_backend = module.attention_calls.before
        module.attention_calls.end(module)
    active = dispatch._AttentionBackendRegistry._active_backend
    if active in names and not watched_modules():
        dispatch._AttentionBackendRegistry.set_active_backend(_before[0])
    if not models_or_pipes:
        registry.discard(dispatch, names)
        _before.clear()


def _refuse_users(names: tuple[str, ...], watched: list[Any]) -> None:
    """Raises ValueError where a module that is not watched would be left with a name that nobody knows."""
    import torch

    known = {id(module) for module in watched}
    users = [module for module in gc.get_objects() if issubclass(type(module), torch.nn.Module) and id(module) not in known
             and getattr(getattr(module, "processor", None), "_attention_backend", None) in names]
    if users:
        listed = ", ".join(sorted({type(module).__name__ for module in users}))
        raise ValueError(f"modules of class {listed} still have a backend of lowbit_video; call reset_attention_backend() of "
                         "their models first")
