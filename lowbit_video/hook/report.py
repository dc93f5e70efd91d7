"""Coverage: for every attention module of a model, which variant ran, how often, or why not.

A record is kept per attention module, weakly, by the processor that served it; names are found when
the report is made, by walking the model. The report is a table for a person and a dict for JSON.
"""
from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..precision import EXACT_SPECS
from .dispatcher.names import RECIPE


@dataclass
class Record:
    """What ran for one attention module.

    calls: how often each (variant name, reason) ran; the reason is empty where the variant is the one
    that was asked for, and says why it is not otherwise. tiles: of variants that pool keys, how many pairs of a query tile and
    a key tile were kept and how many pooled.
    """

    name: str = ""
    calls: Counter = field(default_factory=Counter)
    tiles: dict[str, tuple[int, int]] = field(default_factory=dict)

    def note(self, variant: str, reason: str = "", tiles: tuple[int, int] | None = None) -> None:
        """Count one call. tiles: how many it kept and pooled, where it pools."""
        self.calls[(variant, reason)] += 1
        if tiles is not None:
            self.tiles[variant] = _added(self.tiles.get(variant, (0, 0)), tiles)

    def clear(self) -> None:
        """Forget all counts; the name stays."""
        self.calls.clear()
        self.tiles.clear()

    def copy(self) -> Record:
        """One with the same counts."""
        return Record(self.name, Counter(self.calls), dict(self.tiles))

    def since(self, before: Record) -> Record:
        """What was counted after `before`, an earlier copy."""
        tiles = {variant: tuple(now - then for now, then in zip(counts, before.tiles.get(variant, (0, 0))))
                 for variant, counts in self.tiles.items()}
        return Record(self.name, self.calls - before.calls, {name: counts for name, counts in tiles.items() if any(counts)})

    def add(self, more: Record) -> None:
        """Count what another record has counted."""
        self.calls.update(more.calls)
        for variant, counts in more.tiles.items():
            self.tiles[variant] = _added(self.tiles.get(variant, (0, 0)), counts)


def _added(some: tuple[int, int], more: tuple[int, int]) -> tuple[int, int]:
    return some[0] + more[0], some[1] + more[1]


class Records:
    """Records by attention module; a module that dies takes its record along."""

    def __init__(self) -> None:
        self._by_module: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def of(self, module: Any) -> Record:
        """The module's record, made when first asked for."""
        record = self._by_module.get(module)
        if record is None:
            record = self._by_module[module] = Record()
        return record

    def peek(self, module: Any) -> Record | None:
        """The module's record, or None where nothing was recorded."""
        return self._by_module.get(module)

    def clear(self) -> None:
        """Forget all counts; names stay."""
        for record in self._by_module.values():
            record.clear()


def named_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, module) of every module below `model`, a Paddle Layer or a torch Module."""
    walk = getattr(model, "named_sublayers", None) or getattr(model, "named_modules", None)
    if walk is None:
        return
    for name, module in walk():
        if name:
            yield name, module


def attention_modules(model: Any) -> dict[str, Any]:
    """The modules of `model` that take a processor, by name ("transformer_blocks.0.attn1")."""
    return {name: module for name, module in named_modules(model)
            if hasattr(module, "processor") and hasattr(module, "to_q")}


DENOISERS = ("transformer", "unet")
"""A pipeline's names for its denoising model."""


def transformer_of(model_or_pipe: Any) -> Any:
    """The denoising model of a pipeline, or the model itself."""
    for name in DENOISERS:
        part = getattr(model_or_pipe, name, None)
        if part is not None and _is_model(part):
            return part
    if _is_model(model_or_pipe):
        return model_or_pipe
    if getattr(model_or_pipe, "transformer", model_or_pipe) is None:
        raise TypeError(f"the {type(model_or_pipe).__name__} was made without its transformer, which is None: load it with one")
    raise TypeError(f"{type(model_or_pipe).__name__} is neither a pipeline with a transformer nor a model; "
                    "give a CogVideoXPipeline, its transformer, or another Layer (Paddle) or Module (torch)")


def _is_model(part: Any) -> bool:
    return hasattr(part, "named_sublayers") or hasattr(part, "named_modules")


def models_of(model_or_pipe: Any) -> dict[str, Any]:
    """The denoising models by the pipeline's names for them ("transformer" or "unet", "transformer_2"); a bare model by ""."""
    model = transformer_of(model_or_pipe)
    if model is model_or_pipe:
        return {"": model}
    name = next(name for name in DENOISERS if getattr(model_or_pipe, name, None) is model)
    second = getattr(model_or_pipe, "transformer_2", None)
    return {name: model, **({} if second is None else {"transformer_2": second})}


def recipe_modules(model: Any) -> dict[str, Any]:
    """The modules that a recipe is about, by name: of a model that asks diffusers' dispatcher those that do, else all that take
    a processor."""
    return dispatching_modules(model) or attention_modules(model)


def dispatching_modules(model: Any) -> dict[str, Any]:
    """The modules whose processor hands q, k and v to diffusers' attention dispatcher, by name."""
    return {name: module for name, module in named_modules(model) if _dispatches(module)}


def _dispatches(module: Any) -> bool:
    return hasattr(getattr(module, "processor", None), "_attention_backend")


@dataclass(frozen=True)
class ModuleCoverage:
    """One attention module in the report.

    component: "transformer", "unet", "transformer_2" ("" for a bare model). processor: its description.
    runs: (variant, calls, reason) of each variant that ran; empty where nothing did, and then
    `reason` says why. low_bit: True where every call ran at the asked-for low bit width. tiles: (variant, kept, pooled), of
    variants that pool keys.
    """

    component: str
    name: str
    processor: str
    runs: tuple[tuple[str, int, str], ...] = ()
    reason: str = ""
    hooked: bool = False
    tiles: tuple[tuple[str, int, int], ...] = ()

    @property
    def calls(self) -> int:
        """All calls together."""
        return sum(count for _, count, _ in self.runs)

    @property
    def exact_by_recipe(self) -> bool:
        """Whether some call was exact because a recipe has it so."""
        rung = lambda variant: variant.partition(" (")[0].rpartition(": ")[2]
        return any(not reason and rung(variant) in EXACT_SPECS for variant, _, reason in self.runs)

    @property
    def full_name(self) -> str:
        """Component and name, joined."""
        return f"{self.component}.{self.name}" if self.component else self.name

    def as_dict(self) -> dict:
        """The same as plain values."""
        tiles = {variant: {"kept_tiles": kept, "pooled_tiles": pooled} for variant, kept, pooled in self.tiles}
        return {"module": self.full_name, "processor": self.processor, "hooked": self.hooked, "calls": self.calls,
                "runs": [{"variant": v, "calls": n, "reason": r, **tiles.get(v, {})} for v, n, r in self.runs],
                "reason": self.reason}


@dataclass(frozen=True)
class Coverage:
    """The report: `str()` is a table, `as_dict()` is for JSON."""

    modules: tuple[ModuleCoverage, ...]
    untouched: tuple[tuple[str, int], ...] = ()

    @property
    def fallbacks(self) -> tuple[ModuleCoverage, ...]:
        """Hooked modules in which some call did not run as asked."""
        return tuple(m for m in self.modules if m.hooked and any(reason for _, _, reason in m.runs))

    def variants(self) -> dict[str, int]:
        """Calls per variant over all modules."""
        total: Counter = Counter()
        for module in self.modules:
            for variant, count, _ in module.runs:
                total[variant] += count
        return dict(total)

    def tiles(self) -> dict[str, tuple[int, int]]:
        """Pairs of a query tile and a key tile that were kept, and pooled, per variant that pools keys, over all modules."""
        total: dict[str, tuple[int, int]] = {}
        for module in self.modules:
            for variant, *counts in module.tiles:
                total[variant] = _added(total.get(variant, (0, 0)), tuple(counts))
        return total

    def as_dict(self) -> dict:
        """The report as plain values."""
        return {"modules": [m.as_dict() for m in self.modules], "variants": self.variants(),
                "tiles": {variant: {"kept": kept, "pooled": pooled} for variant, (kept, pooled) in self.tiles().items()},
                "untouched": [{"component": name, "attention_modules": count} for name, count in self.untouched],
                "summary": self.summary()}

    def summary(self) -> str:
        """One sentence."""
        hooked = [m for m in self.modules if m.hooked]
        ran = [m for m in hooked if m.calls]
        kept = [m for m in ran if not any(reason for _, _, reason in m.runs)]
        whole = [m for m in kept if not m.exact_by_recipe]
        text = f"{len(whole)} of {len(self.modules)} attention modules ran at low bit in every call"
        if len(whole) < len(self.modules):
            parts = []
            if len(kept) - len(whole):
                parts.append(f"{len(kept) - len(whole)} exact in some calls, as the recipe says")
            if len(ran) - len(kept):
                parts.append(f"{len(ran) - len(kept)} fell back")
            if len(hooked) - len(ran):
                parts.append(f"{len(hooked) - len(ran)} hooked but not called")
            if len(self.modules) - len(hooked):
                parts.append(f"{len(self.modules) - len(hooked)} exact")
            text += f" ({', '.join(parts)})"
        return text

    def __str__(self) -> str:
        rows = [("attention module", "processor", "what ran", "calls", "why not as asked")]
        for module in self.modules:
            runs = module.runs or (("-", 0, module.reason),)
            shares = {variant: f", {kept / (kept + pooled):.1%} kept" for variant, kept, pooled in module.tiles}
            for index, (variant, count, reason) in enumerate(runs):
                first, variant = index == 0, variant + shares.get(variant, "")
                rows.append((module.full_name if first else "", module.processor if first else "", variant, str(count), reason))
        for name, count in self.untouched:
            kind = f"{count} attention module{'s' if count != 1 else ''}" if count else "no attention modules"
            rows.append((name, "untouched", kind, "", ""))
        lines = [_table(rows), f"{self.summary()}."]
        if tiles := self.tiles():
            kept, pooled = map(sum, zip(*tiles.values()))
            lines.append(f"Where keys were pooled, {kept} of {kept + pooled} pairs of a query tile and a key tile were kept "
                         f"({kept / (kept + pooled):.1%}) and {pooled} pooled.")
        return "\n".join(lines)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) if column == 3 else cell.ljust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def coverage(model_or_pipe: Any) -> Coverage:
    """Report on every attention module of a pipeline or model.

    model_or_pipe: a pipeline (its VAE and text encoder are counted as untouched) or a model.
    Counts are those of the processors that are set now: read the report before `remove()`.
    Raises TypeError for something that holds no model.
    """
    models = models_of(model_or_pipe)
    rows = tuple(_module_coverage(component, name, module) for component, model in models.items()
                 for name, module in {**attention_modules(model), **dispatching_modules(model)}.items())
    untouched = ()
    if "" not in models:
        parts = ((name, getattr(model_or_pipe, name, None)) for name in ("vae", "text_encoder", "text_encoder_2"))
        untouched = tuple((name, _count_attention(part)) for name, part in parts if part is not None and _is_model(part))
    return Coverage(rows, untouched)


def _module_coverage(component: str, name: str, module: Any) -> ModuleCoverage:
    processor = module.processor
    records = getattr(processor, "records", None)
    if _dispatches(module):
        return _dispatched_coverage(component, name, module)
    if not isinstance(records, Records):
        reason = "not hooked: the processor is not from lowbit_video, so its calls are not counted"
        if active_backend().startswith("lowbit_"):
            reason = f"not hooked: its processor bypasses diffusers' dispatcher, so {active_backend()!r} does nothing here"
        return ModuleCoverage(component, name, type(processor).__name__, reason=reason)
    hooked = bool(getattr(processor, "low_bit", False))
    record = records.peek(module)
    runs = tuple((variant, count, reason) for (variant, reason), count in record.calls.items()) if record else ()
    tiles = tuple((variant, *counts) for variant, counts in record.tiles.items()) if record else ()
    return ModuleCoverage(component, name, str(processor), runs, "" if runs else "not called yet", hooked, tiles)


def active_backend() -> str:
    """The backend of diffusers' dispatcher for modules that have none of their own; "" where there is no dispatcher."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return "" if dispatch is None else str(dispatch._AttentionBackendRegistry._active_backend.value)


def _dispatched_coverage(component: str, name: str, module: Any) -> ModuleCoverage:
    """A module that dispatches: its backend, and its calls if `register_diffusers` was given its model."""
    own = module.processor._attention_backend
    backend = active_backend() if own is None else str(getattr(own, "value", own))
    watched = getattr(module, "attention_calls", None)
    by_recipe = backend == RECIPE and watched is not None and watched.attention is not None
    processor = f"{type(module.processor).__name__}, {watched.attention if by_recipe else f'backend {backend}'}"
    runs = () if watched is None else tuple((variant, count, reason)
                                            for (variant, reason), count in watched.record.calls.items())
    hooked = backend.startswith("lowbit_") or bool(runs)  # the backend may have been set for a while
    if watched is None and hooked:
        reason = "not counted: lowbit_video.register_diffusers(model) before the run counts its calls"
    else:
        reason = "" if runs else "not called yet" if hooked else "not hooked: it has a backend of diffusers"
    tiles = () if watched is None else tuple((variant, *counts) for variant, counts in watched.record.tiles.items())
    return ModuleCoverage(component, name, processor, runs, reason, hooked, tiles)


def _count_attention(part: Any) -> int:
    """Attention modules of a part without hooks: class names with "Attention", innermost only."""
    names = [name for name, module in named_modules(part) if "Attention" in type(module).__name__]
    return sum(not any(other.startswith(f"{name}.") for other in names) for name in names)
