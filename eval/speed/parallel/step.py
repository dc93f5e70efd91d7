"""A whole step of a CogVideoX transformer on several GPUs: one forward of both halves of guidance, beside one GPU."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowbit_video import Recipe, apply, denoising_step, parallelize
from lowbit_video.precision import names_recipe

from ..cogvideox import LATENTS
from .apart import CODES, COMPUTED, EXCHANGED, TappedWire, formats, replay
from .clock import Clock
from .memory import counted
from .models import paddle_transformer, torch_transformer
from .table import also

ROUNDS = 5
AHEAD_PASSES = 8
TEXT_TOKENS, TEXT_CHANNELS = 226, 4096
MOST_GRAPHS = 64
"""Of a block: each split has its shapes."""
APART_ROUNDS = 2
"""Turns, at most, of computation and transfers apart."""


class Way(NamedTuple):
    """How a step is shared: parallelize's degrees, and its exchange and output."""

    degrees: dict[str, int]
    exchange: str = "auto"
    output: str = "16bit"

    @property
    def sends(self) -> bool:
        """Whether attention's tensors travel."""
        return self.degrees["ulysses"] * self.degrees["ring"] > 1


def splits(size: int) -> dict[str, dict[str, int]]:
    """The ways to share a step among so many ranks, by name."""
    found = {}
    for cfg in (1, 2):
        for ulysses in range(1, size + 1):
            if size % (cfg * ulysses) == 0:
                ring = size // cfg // ulysses
                parts = {"cfg": cfg, "ulysses": ulysses, "ring": ring}
                name = " x ".join(f"{kind}{degree}" for kind, degree in parts.items() if degree > 1)
                found[name] = parts
    return found


def measure(model_name: str, precision: str, framework: str, wire: Any, clock: Clock, say: Callable[[str], None],
            rounds: int | None = None, only: Sequence[str] | None = None, more: int = 0, compiled: bool = False,
            cuda_graph: bool = False) -> dict[str, Any]:
    """Times of a step by every split, in turns, bytes, memory, and how far each is from one GPU's prediction.

    All are then timed without their transfers and as their transfers alone (`apart`).
    precision: or a recipe's file or name, of which the step is that at half of the denoising. rounds: turns; None: ROUNDS.
    only: the splits; None: all. more: how many of those that send attention's tensors, the fastest, are timed with whatever
    else can travel; "failed" of the result has those that cannot be. compiled: whether diffusers' blocks are, for one GPU too.
    cuda_graph: whether each call is recorded, once, and replayed in its turns, one GPU's and the parts apart too; memory is
    then what recording takes.
    """
    runtime, wire, rounds = clock.runtime, TappedWire(wire), rounds or ROUNDS
    model = (torch_transformer if framework == "torch" else paddle_transformer)(model_name)
    recipe = names_recipe(precision)
    apply(model, Recipe.load(precision) if recipe else precision)
    if compiled:
        compile_blocks(model)
    step = _step(model, framework, *_inputs(model_name, clock), runtime, clock.like)
    others = {} if recipe else _other_formats(precision)
    ways: dict[str, Way | None] = {"one": None}
    ways.update({name: Way(parts) for name, parts in splits(wire.size).items() if only is None or name in only})
    outs, sent, passed, peaks, failed = {}, {}, {}, {}, {}
    calls: dict[str, Callable[[], Any]] = {}
    recorded = _recorder() if cuda_graph else None

    @contextlib.contextmanager
    def shared(name: str) -> Iterator[None]:
        if name.endswith(EXCHANGED):
            yield
            return
        way, silent = ways[name.removesuffix(COMPUTED)], name.endswith(COMPUTED)
        half = denoising_step(model, 1, 2) if recipe else contextlib.nullcontext()  # of a timestep the host would wait for
        with contextlib.ExitStack() as around:
            around.enter_context(half)
            if way is not None:
                handle = around.enter_context(parallelize(model, **way.degrees, exchange=way.exchange, output=way.output,
                                                          wire=wire))
                handle.mesh.traffic.clear()
                wire.passed.clear()
            around.enter_context(wire.silent() if silent else counted(runtime, peaks, name))
            yield
            if way is not None and name not in sent:
                sent[name], passed[name] = handle.mesh.traffic.as_dict(), list(wire.passed)
        if not silent:
            peaks[name] -= wire.kept_gib

    def first(name: str, call: Callable[[], Any] = step) -> None:
        calls[name] = call
        with shared(name):
            out = call()
        if recorded is not None:
            with shared(name):
                calls[name] = recorded(call)
                calls[name]()
            out = calls[name]()
        if name in ways:
            outs[name] = runtime.to_numpy(out)

    def tried(name: str, call: Callable[[], Any] = step) -> None:
        try:
            first(name, call)
        except Exception as error:  # on all ranks alike: a kernel that does not compile, say, or what no graph can hold
            failed[name] = f"{type(error).__name__}: {error}"
            say(f"{model_name} step, {name}: {failed[name]}")
            for known in (calls, ways, sent, passed):
                known.pop(name, None)

    def timed(names: Iterable[str], rounds: int) -> dict[str, float]:
        around = shared if recorded is None else lambda name: contextlib.nullcontext()
        return clock.together({name: calls[name] for name in names}, rounds, AHEAD_PASSES, around)

    first("one")
    for name in list(ways)[1:]:
        tried(name)
    times = timed(ways, rounds)
    best = sorted((name for name, way in ways.items() if way is not None and way.sends), key=times.__getitem__)[:more]
    added = {f"{name}, {how}": Way(ways[name].degrees, *travels) for name in best for how, travels in others.items()
             if travels[1] == "16bit" or ways[name].degrees["ulysses"] > 1}
    ways.update(added)
    for name in added:
        tried(name)
    times.update(timed((name for name in added if name in ways), rounds))
    apart = {name + part: call for name in passed
             for part, call in ((COMPUTED, step), (EXCHANGED, replay(wire.wire, passed[name], clock.like)))}
    calls.update(apart)
    for name in apart if cuda_graph else ():
        tried(name, apart[name])
    times.update(timed((name for name in apart if name in calls), min(rounds, APART_ROUNDS)))
    memory = clock.peaks(peaks)
    result: dict[str, Any] = {"model": model_name, "precision": precision, "framework": framework, "ranks": wire.size,
                              "exchange": "auto", "output": "16bit", "compiled": compiled, "cuda_graph": cuda_graph,
                              "failed": failed, "ways": {}}
    for name in ways:
        row = result["ways"][name] = {
            "ms": times[name], "of_ideal": times["one"] / wire.size / times[name], "bytes": sent.get(name),
            "sqnr_db": _sqnr_db(outs[name], outs["one"]), "memory_gib": memory[name],
            **{_key(part): times[name + part] for part in (COMPUTED, EXCHANGED) if name + part in times}}
        say(f"{model_name} step, {framework}, {precision}{also(result)}, {name}: {_line(row)}")
    return result


def _other_formats(precision: str) -> dict[str, tuple[str, str]]:
    """What else than a precision's codes can travel; nothing where there are none, as all travels in 16 bits then."""
    found = formats(precision)
    return {} if found.pop(CODES, None) is None else found


def _inputs(model_name: str, clock: Clock) -> tuple[Any, Any]:
    """(noisy latents, text features) of both halves of guidance, float16, the same on every rank."""
    rng = np.random.default_rng(0)
    frames, height, width = LATENTS[model_name]
    normal = lambda *shape: clock.runtime.from_numpy(rng.standard_normal(shape).astype(np.float32), clock.like, "float16")
    return normal(2, frames, 16, height, width), normal(2, TEXT_TOKENS, TEXT_CHANNELS)


def _sqnr_db(out: np.ndarray, one: np.ndarray) -> float | None:
    """Of a prediction beside one GPU's, dB; None where they are equal."""
    wanted = one.astype(np.float64)
    error = ((out - wanted) ** 2).sum()
    return float(10 * np.log10((wanted**2).sum() / error)) if error else None


def _key(part: str) -> str:
    """Under which the time of a part apart stands in a row."""
    return f"{part.removeprefix(' / ')}_ms"


def _line(row: Mapping[str, Any]) -> str:
    """A way's row in words."""
    equal = "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
    return (f"{row['ms']:.1f} ms, {100 * row['of_ideal']:.1f} % of ideal, {equal} to one GPU"
            + (f", {max(row['memory_gib']):.1f} GiB" if row["memory_gib"] else "")
            + (f", {row['bytes']['sent_total'] / 2**20:.0f} MiB sent" if row["bytes"] else "")
            + "".join(f"; {row[_key(part)]:.1f} ms {part.removeprefix(' / ')}" for part in (COMPUTED, EXCHANGED)
                      if _key(part) in row))


def _recorder() -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """What makes calls CUDA graphs, of one memory, for they are replayed one after the other."""
    import torch

    from lowbit_video.cuda_graphs.torch_capture import Graphed

    return functools.partial(Graphed, pool=torch.cuda.graph_pool_handle())


def compile_blocks(model: Any) -> None:
    """Compiles the blocks of a diffusers model, once for each split's shapes; attention, with its exchange, is one operator."""
    import torch

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for block in model.transformer_blocks:
        block.compile(dynamic=False)


def _step(model: Any, framework: str, latents: Any, text: Any, runtime: Any, like: Any) -> Callable[[], Any]:
    """One forward of the model."""
    timestep = runtime.from_numpy(np.array([500, 500], np.int64), like, "int64")
    frames, height, width = (runtime.shape(latents)[number] for number in (1, 3, 4))
    if framework == "paddle":
        import paddle

        rotary = model.rotary_tables(frames, height, width)

        def step() -> Any:
            with paddle.no_grad():
                return model(latents, text, timestep, image_rotary_emb=rotary)

        return step
    import torch

    rotary = None
    if model.config.use_rotary_positional_embeddings:
        patch_t = model.config.patch_size_t or 1
        tokens = frames // patch_t * (height // 2) * (width // 2)
        angle = torch.rand(tokens, 32, device="cuda").repeat_interleave(2, 1)
        rotary = (angle.cos(), angle.sin())

    def step() -> Any:
        with torch.no_grad():
            return model(hidden_states=latents, encoder_hidden_states=text, timestep=timestep, image_rotary_emb=rotary,
                         return_dict=False)[0]

    return step
