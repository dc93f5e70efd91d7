"""diffusers' table of attention backends, which has no public registration: how ours go in, and out again without a trace.

`AttentionBackendName` gains a member a backend, and `_AttentionBackendRegistry.register` fills its four tables (the last one,
who may run on several ranks, has been a dictionary and a set). All of it is looked at first: what is unknown is refused.
Source: huggingface/diffusers, models/attention_dispatch.py, 0.42.0 and 0.42.1.
"""
from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from enum import EnumMeta
from types import ModuleType
from typing import Any

from ...errors import UnsupportedError
from ...installing import pip_install

DISPATCH = "diffusers.models.attention_dispatch"
TABLES = {"_backends": dict, "_constraints": dict, "_supported_arg_names": dict, "_supports_context_parallel": (dict, set)}
ARGUMENTS = {
    "dispatch_attention_fn": {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
                              "attention_kwargs", "backend", "parallel_config"},
    "_templated_context_parallel_attention": {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale",
                                              "enable_gqa", "return_lse", "forward_op", "backward_op", "_parallel_config"}}


def dispatch_module(names: Iterable[str]) -> ModuleType:
    """diffusers' dispatcher, imported though DIFFUSERS_ATTN_BACKEND may name one of `names`, which it does not know yet.

    Raises ImportError without diffusers, which names what to install.
    """
    if "diffusers" not in sys.modules and importlib.util.find_spec("diffusers") is None:
        raise ImportError(f"register_diffusers needs diffusers, which is not installed: {pip_install('diffusers')}; "
                          "lowbit_video.attention and lowbit_video.apply do without")
    if DISPATCH not in sys.modules:
        constants = importlib.import_module("diffusers.utils.constants")
        wanted = constants.DIFFUSERS_ATTN_BACKEND
        if wanted in set(names):
            constants.DIFFUSERS_ATTN_BACKEND = "native"
            try:
                importlib.import_module(DISPATCH)
            finally:
                constants.DIFFUSERS_ATTN_BACKEND = wanted
    return importlib.import_module(DISPATCH)


def check_layout(dispatch: ModuleType) -> None:
    """Raises UnsupportedError, naming it, for a part of the dispatcher that is not as it is known here."""
    registry, names = getattr(dispatch, "_AttentionBackendRegistry", None), getattr(dispatch, "AttentionBackendName", None)
    unknown = [f"_AttentionBackendRegistry.{table}" for table, kind in TABLES.items()
               if not isinstance(getattr(registry, table, None), kind)]
    if not isinstance(names, EnumMeta) or not issubclass(names, str):
        unknown.append("AttentionBackendName")
    elif not isinstance(getattr(registry, "_active_backend", None), names):
        unknown.append("_AttentionBackendRegistry._active_backend")
    if not callable(getattr(registry, "register", None)):
        unknown.append("_AttentionBackendRegistry.register")
    for name, known in ARGUMENTS.items():
        function = getattr(dispatch, name, None)
        given = set(inspect.signature(function).parameters) if callable(function) else set()
        unknown += [f"{name}({argument}=)" for argument in sorted(given - known)] if given else [name]
    if unknown:
        version = getattr(sys.modules.get("diffusers"), "__version__", "this version")
        raise UnsupportedError(f"diffusers {version} keeps its attention backends in a way that is not known here: "
                               f"{', '.join(unknown)}; 0.42.0 and 0.42.1 are known; nothing was registered")


def add(dispatch: ModuleType, functions: dict[str, Callable]) -> None:
    """Registers a backend of each name that is not there yet; all or, after an error, none."""
    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    new = {name: function for name, function in functions.items() if name not in names._value2member_map_}
    try:
        for name, function in new.items():
            registry.register(_add_member(names, name), supports_context_parallel=True)(function)
    except BaseException:
        discard(dispatch, new)
        raise


def discard(dispatch: ModuleType, added: Iterable[str]) -> None:
    """Takes backends out again."""
    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    for name in added:
        for table in TABLES:
            entries = getattr(registry, table)
            entries.pop(name, None) if isinstance(entries, dict) else entries.discard(name)
        _discard_member(names, name)


def _add_member(names: Any, value: str) -> Any:
    member = str.__new__(names, value)
    member._name_, member._value_, member.__objclass__ = value.upper(), value, names
    member._sort_order_ = len(names._member_names_)
    setattr(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[value] = member
    return member


def _discard_member(names: Any, value: str) -> None:
    member = names._value2member_map_.pop(value, None)
    if member is not None:
        del names._member_map_[member._name_]  # first: the class refuses to give up a member
        names._member_names_.remove(member._name_)
        delattr(names, member._name_)
