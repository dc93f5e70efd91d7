"""`Recipe`: rules in order, and where they come from; read, written, and resolved on a model.

    format = 1

    [about]
    model = "examples/small_cogvideox/model"

    [[rules]]
    rung = "int8+fp8"

    [[rules]]
    layers = "transformer_blocks.0.*"
    heads = "0-1"
    steps = "0-0.2"
    rung = "exact"
"""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...arguments import shown
from ...errors import UnsupportedError
from ...precision import PRESETS
from ...token_order import check_order
from ..report import recipe_modules, transformer_of
from .rule import Rule, as_rule
from .table import Table, table_of
from .toml import read_toml, write_toml

FORMAT = 1
KEYS = ("format", "about", "rules")
ABOUT = ("title", "model", "prompts", "seed", "steps", "order", "metric", "budget", "predicted_error_db", "predicted_spread_db",
         "predicted_cost", "found_error_db", "cost_table", "rungs", "left_out", "hardware", "versions", "commit", "date",
         "command")
"""What a recipe may say of where it comes from; costs are shares of int8+fp8's time, or bits of Q and K, as cost_table says.
predicted_spread_db: the least and the most that is predicted of a measured prompt by itself. rungs: those that could be
chosen, each with its cost; left_out: which could not, and why."""


@dataclass(frozen=True)
class Recipe:
    """Bit widths by layer, head and step of the denoising.

    rules: Rules, or tables with their fields; of those that meet a cell the last one wins, so the first is a rule for all.
    about: where the recipe comes from, by the keys in ABOUT; plain values and lists of them.
    source: how errors name it.

    Raises ValueError, naming source and rule, for no rules, for a rule that cannot be meant, for an unknown key and for an
    order of tokens that does not exist.
    """

    rules: Sequence[Rule | Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: str = field(default="the recipe", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.rules, (list, tuple)) or not self.rules:
            raise ValueError(f"{self.source} has no rules; give at least one, such as a table with rung = \"int8+fp8\"")
        if not isinstance(self.about, Mapping):
            raise ValueError(f"{self.source}: about is {shown(self.about)}; give a table")
        unknown = [shown(key) for key in self.about if key not in ABOUT]
        if unknown:
            raise ValueError(f"{self.source}: about has unknown keys {', '.join(unknown)}; there are: {', '.join(ABOUT)}")
        if "order" in self.about:
            try:
                check_order(self.about["order"])
            except ValueError as error:
                raise ValueError(f"{self.source}, about: {error}") from None
        rules = []
        for number, given in enumerate(self.rules, 1):
            try:
                rules.append(as_rule(given))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.source}, rule {number}: {error}") from None
        object.__setattr__(self, "rules", tuple(rules))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Reads a file, or one of PRESETS by its name alone.

        Raises ValueError, naming file and rule, for no such file, for what is no recipe, and as Recipe.
        """
        preset = isinstance(path, str) and path in PRESETS
        held = read_toml(Path(__file__).parent / f"{path}.toml" if preset else path)
        source = f"the preset {path}" if preset else str(path)
        unknown = [shown(key) for key in held if key not in KEYS]
        if unknown:
            raise ValueError(f"{source} has unknown keys {', '.join(unknown)}; there are: {', '.join(KEYS)}")
        if held.get("format") != FORMAT:
            raise ValueError(f"{source} has format {shown(held.get('format'))}; this version reads format = {FORMAT}")
        return cls(held.get("rules", []), held.get("about", {}), source)

    @property
    def rungs(self) -> tuple[str, ...]:
        """The rungs that its rules give, in their order, each once."""
        return tuple(dict.fromkeys(rule.rung for rule in self.rules))

    def save(self, path: str | os.PathLike) -> None:
        """Writes a file that `load` reads, whole or not at all."""
        about = {key: self.about[key] for key in ABOUT if key in self.about}
        write_toml(path, {"format": FORMAT, "about": about, "rules": [rule.as_dict() for rule in self.rules]})

    def resolve(self, model_or_pipe: Any) -> Table:
        """What each layer of a model gets. model_or_pipe: as `apply` takes it.

        Raises ValueError, naming source and rule, for a rule that names no attention module or heads that one has not, and
        for cells that no rule meets.
        """
        model = transformer_of(model_or_pipe)
        modules = recipe_modules(model)
        if unknown := [name for name, module in modules.items() if not hasattr(module, "heads")]:
            raise UnsupportedError(f"{unknown[0]} of {type(model).__name__} does not say how many heads it has (heads)")
        heads = {name: int(module.heads) for name, module in modules.items()}
        if not heads:
            raise ValueError(f"{type(model).__name__} has no attention module that takes a processor (processor, to_q, ...)")
        return table_of(self.rules, heads, self.source)

    def __str__(self) -> str:
        return f"{self.source} ({len(self.rules)} rules)"
