"""Model configurations: read and written as diffusers does, unknown keys refused by name.

A model's known keys are the parameters of its `__init__`, so that a key is declared once. `keep_config` records what a
model was built with, defaults included.
"""
from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lowbit_video import files
from lowbit_video.arguments import flag, number, shown, whole

CONFIG_NAME = "config.json"
# The version whose behaviour and files this package reproduces.
DIFFUSERS_VERSION = "0.42.0"


class ConfigError(ValueError):
    """A configuration that cannot be used: wrong class, unknown key, unreadable JSON."""


class Config(dict):
    """A dict whose keys can also be read as attributes, as `model.config.patch_size`; it is not to be changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no config key {name!r}; known: {', '.join(sorted(self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError("a config is read-only: build a new model with the other value")


def known_keys(model_class: type) -> tuple[str, ...]:
    """Returns the config keys that a class declares: the parameters of its `__init__`."""
    return tuple(inspect.signature(model_class.__init__).parameters)[1:]


MAX_WHOLE = 2**31 - 1
"""Of a configuration's whole numbers, all of which count something."""


def check_kind(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError or TypeError for a value that a type hint does not allow: int (0 to MAX_WHOLE), float (finite), bool,
    str, a Sequence of one of them, or None. Other hints allow everything."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in kinds:
        return
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is bool:
        flag(name, value)
    elif kind is int:
        whole(name, value, 0, MAX_WHOLE)
    elif kind is float:
        number(name, value)
    elif kind is str and not isinstance(value, str):
        raise TypeError(f"{name} is {shown(value)}; give a text")
    elif typing.get_origin(kind) is Sequence:
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise TypeError(f"{name} is {shown(value)}; give a list")
        for one in value:
            check_kind(f"a value of {name}", one, typing.get_args(kind)[0])


MAX_EPSILON = 1e-3
"""Of what norms add to a variance: Paddle takes no more."""


def check_between(config: Config, keys: Iterable[str], least: float, most: float) -> None:
    """Raises ConfigError for a value of these keys beyond its bounds; None is left alone."""
    for key in keys:
        if config[key] is not None and not least <= config[key] <= most:
            raise ConfigError(f"{key} is {shown(config[key])}; give one from {least} to {most}")


def keep_config(init: Callable) -> Callable:
    """Decorates an `__init__` so that `self.config` holds every argument, defaults included, before the body runs.

    It then raises ConfigError for an argument that is not what its type hint says.
    """
    signature = inspect.signature(init)
    hints = functools.cache(lambda: typing.get_type_hints(init))  # when first asked for: the module is not complete yet

    @functools.wraps(init)
    def init_and_keep(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        del values[next(iter(signature.parameters))]
        for name, value in values.items():
            if value is not signature.parameters[name].default:
                try:
                    check_kind(name, value, hints().get(name, Any))
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"{type(self).__name__}: {error}") from None
        # past nn.Layer's own __setattr__, which needs its __init__ to have run
        object.__setattr__(self, "config", Config(values))
        init(self, *args, **kwargs)

    return init_and_keep


read_json = functools.partial(files.read_json, error=ConfigError)
"""Reads a JSON object. ConfigError: no such file, not JSON, or not an object."""
write_json = functools.partial(files.write_json, indent=2, sort_keys=True, ensure_ascii=False)
"""Writes a JSON object as diffusers lays it out, whole or not at all."""


def load_config(
    folder: str | os.PathLike,
    class_name: str | tuple[str, ...],
    known: Iterable[str] | None = None,
    ignored: Iterable[str] = (),
    file_name: str = CONFIG_NAME,
) -> dict[str, Any]:
    """Reads `folder/config.json` for a class.

    Args:
        folder: a component's folder, as diffusers or transformers writes it.
        class_name: what `_class_name` (diffusers) or `architectures` (transformers) must say; a tuple allows several.
        known: the keys that the class takes; None: keys are not checked.
        ignored: further keys that published configurations hold and that change nothing here; they are dropped.
        file_name: another name for the file, such as "scheduler_config.json".
    Returns:
        the keys and values, without those that begin with "_" and without the ignored ones.
    Raises:
        ConfigError: no file, not JSON, another class, or keys that are neither known nor ignored (all are listed).
    """
    path = os.path.join(os.fspath(folder), file_name)
    raw = read_json(path)
    found = [raw["_class_name"]] if "_class_name" in raw else raw.get("architectures")
    found = [found] if found is not None and not isinstance(found, list) else found
    allowed = (class_name,) if isinstance(class_name, str) else tuple(class_name)
    if found is not None and not any(isinstance(name, str) and name in allowed for name in found):
        raise ConfigError(f"{path} describes a {' / '.join(map(str, found)) or 'nothing'}, expected a {' or '.join(allowed)}")
    ignored = set(ignored)
    config = {key: value for key, value in raw.items() if not key.startswith("_") and key not in ignored}
    if known is not None:
        known = tuple(known)
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ConfigError(
                f"{path} has keys that {allowed[0]} does not know: {', '.join(unknown)}. Known: {', '.join(known)}. "
                f"Remove them if they are not needed; they may ask for something that is not implemented."
            )
    return config
