"""`parallelize()`: a pipeline or a model whose every call is the work of several ranks."""
from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import UnsupportedError
from ..hook.base import slot_of
from ..hook.order import order_of
from ..hook.report import attention_modules, coverage, named_modules, transformer_of
from ..runtime.detect import runtime_of
from .agree import from_first, values_of
from .exchange import check_exchange
from .group import Group
from .mesh import Mesh, degrees_for
from .ring import ring
from .split import COMPILED_WHOLE, TokenSplit
from .torch_model import SplitByHooks, check_hooks
from .ulysses import ulysses
from .watch import WatchedWire, process_wire
from .wire import Wire


class Parallel:
    """What one `parallelize` set up; `undo()`, or leaving it as a context manager, takes it back.

    mesh: the groups of ranks. exchange, output: as given. rank, size: of this process among all.
    """

    def __init__(self, pipe: Any, mesh: Mesh, exchange: str, output: str) -> None:
        self.mesh, self.exchange, self.output = mesh, exchange, output
        self.rank, self.size = mesh.world.rank, mesh.world.size
        self._pipe, self._hooks = weakref.ref(pipe), None
        self._waiting = mesh.wire if isinstance(mesh.wire, WatchedWire) else contextlib.nullcontext()
        self._like = next(iter(transformer_of(pipe).parameters()))
        self._runtime = runtime_of(self._like)

    def shared(self, tensor: Any) -> Any:
        """Rank 0's tensor, on every rank. tensor: of one shape and dtype everywhere."""
        return from_first(tensor, self.mesh.world, self._runtime)

    def values(self, value: Any) -> list[Any]:
        """Everyone's value, by rank; the host waits. value: what JSON can hold."""
        with self._waiting:
            return values_of(value, self.mesh.world, self._like, self._runtime)

    def check_same(self, settings: dict[str, Any], what: str) -> None:
        """Raises ValueError, on every rank, where `settings` are not the same on all; says which differ. what: given them."""
        everyone = self.values(settings)
        for rank, theirs in enumerate(everyone):
            differ = [name for name in settings if theirs.get(name) != everyone[0].get(name)]
            if differ:
                listed = "; ".join(f"{name}: {everyone[0].get(name)!r} and {theirs.get(name)!r}" for name in differ)
                raise ValueError(f"ranks 0 and {rank} gave {what} different settings ({listed}); every rank must run the same "
                                 "program with the same arguments")

    def decode(self, work: Callable[[], Any]) -> Any:
        """What `work()` gives, by the VAE's own ranks; the host waits here, where one that does not come is noticed."""
        video = work()
        self.values(None)
        return video

    def report(self) -> dict[str, Any]:
        """What the ranks are and what they sent since `parallelize`, as plain values; every rank must call it.

        traffic: by rank, as `Traffic.as_dict`. coverage_differs: by rank, (variant, calls, reason) of what each attention
        module ran, where that is not what rank 0 ran.
        """
        pipe = self._pipe()
        runs = {module.full_name: [list(run) for run in module.runs] for module in coverage(pipe).modules}
        place = self._runtime.place(self._like).removeprefix("Place(").removesuffix(")")  # Paddle's; PyTorch's are bare
        everyone = self.values({"device": place, "memory_gib": self._runtime.memory_gib(self._like),
                                "traffic": self.mesh.traffic.as_dict(), "runs": runs})
        differs = {str(rank): one["runs"] for rank, one in enumerate(everyone) if one["runs"] != everyone[0]["runs"]}
        return {"ranks": self.size, "degrees": asdict(self.mesh.degrees), "exchange": self.exchange, "output": self.output,
                "devices": [one["device"] for one in everyone], "memory_gib": [one["memory_gib"] for one in everyone],
                "traffic": [one["traffic"] for one in everyone], "coverage_differs": differs}

    def undo(self) -> None:
        """The pipeline or model computes alone again."""
        pipe = self._pipe()
        if pipe is None or _parallel.get(transformer_of(pipe)) is not self:
            return
        model = transformer_of(pipe)
        del _parallel[model]
        self._set(None, None, None)

    def _set(self, parallel: Parallel | None, split: TokenSplit | None, around: Callable | None) -> None:
        """Puts everything in its place, or None into all of them."""
        pipe = self._pipe()
        model = transformer_of(pipe)
        parts = {"": model, **dict(named_modules(model))}
        for name, module in attention_modules(model).items():
            slot_of(module, module.to_q.weight, owner=parts[name.rpartition(".")[0]]).around = around
        if hasattr(model, "split"):
            model.split = split
        elif split is None:
            self._hooks.remove()
        else:
            self._hooks = SplitByHooks(model, split)
        if hasattr(pipe, "parallel"):
            pipe.parallel = parallel
        if hasattr(pipe, "parallel") and pipe.vae is not None:
            pipe.vae.group = None if parallel is None else self.mesh.world
            pipe.vae.degree = None if parallel is None else self.mesh.degrees.vae

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


_parallel: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def parallelize(pipe_or_model: Any, ulysses: int | None = None, ring: int | None = None, cfg: int | None = None,
                vae: int | None = None, exchange: str = "auto", output: str = "16bit", wire: Wire | None = None) -> Parallel:
    """Shares the work of a pipeline or model among all ranks of a run; every rank calls this, and later the pipeline, alike.

    pipe_or_model: a pipeline (its VAE decodes on several ranks too), or its transformer. Of a diffusers pipeline the
        transformer alone is shared, and noise is the caller's: the same generators on every rank.
    ulysses, ring, cfg: how many ways heads, keys and the halves of guidance are shared; their product is the number of ranks,
        and what is None is chosen (guidance first, then heads, then the ring). vae: ranks that decode; None: all.
    exchange: how Q, K and V travel, one of `exchange.EXCHANGES`; output: how attention's output does, one of OUTPUTS.
    wire: what carries the bytes; None: that of `paddle.distributed.launch`, or torch.distributed's default group, and a watch
        over the ranks: one that fails or does not answer (LOWBIT_VIDEO_TIMEOUT, seconds) is named and ends all.
    returns: a handle; `unparallelize(pipe)` or `handle.undo()` gives the pipeline back as it was.

    Attention processors may be set, applied and removed before and after. On every rank the pipeline must be called with the
    same arguments, and a callback must change the same tensors the same way (what it draws itself must come from the same
    seed); noise, seeds and latents are rank 0's whatever the others hold, and `pipe.interrupt` on one rank stops all.
    Raises RuntimeError where no other process was launched, ValueError for degrees that do not make the number of ranks or an
    option that does not exist, UnsupportedError for a model that cannot share its tokens.
    """
    check_exchange(exchange, output)
    model = transformer_of(pipe_or_model)
    if getattr(model, "stored", None) is not None:
        raise UnsupportedError("the pipeline was loaded with low_memory=True, whose weights come and go; supported on several "
                               "ranks are weights that stay: load it without")
    modules = attention_modules(model)
    _check_model(model, modules)
    if wire is None:
        wire = process_wire(next(iter(modules.values())).to_q.weight)
    degrees = degrees_for(wire.size, max(module.heads for module in modules.values()), cfg, ulysses, ring, vae)
    mesh = Mesh(wire, degrees)
    handle = Parallel(pipe_or_model, mesh, exchange, output)
    handle.check_same({**asdict(degrees), "exchange": exchange, "output": output, "modules": len(modules),
                       "token_order": order_of(model)}, "parallelize")
    _say_unequal_memory(handle)
    split = TokenSplit(model, mesh)
    handle._set(handle, split, _around(mesh, split, exchange, output))
    mesh.traffic.clear()
    _parallel[model] = handle
    return handle


def parallel_of(pipe_or_model: Any) -> Parallel | None:
    """What `parallelize` set up for a pipeline or model, if it is parallel now."""
    return _parallel.get(transformer_of(pipe_or_model))


def unparallelize(pipe_or_model: Any) -> bool:
    """Takes `parallelize` back: the pipeline or model computes alone again. returns: whether there was one to take back."""
    handle = parallel_of(pipe_or_model)
    if handle is None:
        return False
    handle.undo()
    return True


def _check_model(model: Any, modules: dict[str, Any]) -> None:
    if not modules:
        raise ValueError(f"{type(model).__name__} has no attention module that takes a processor (processor, to_q, ...)")
    if model in _parallel:
        raise ValueError(f"this {type(model).__name__} is parallel already; call unparallelize first")
    if not hasattr(model, "split") and not all(hasattr(model, name) for name in ("register_forward_pre_hook", "proj_out",
                                                                                  "transformer_blocks")):
        raise UnsupportedError(f"{type(model).__name__} cannot share its tokens: its forward knows no `split` (a TokenSplit), "
                               "and it has no transformer_blocks and proj_out to hook; the CogVideoXTransformer3DModel of "
                               "lowbit_video.pipelines and that of diffusers can")
    if not hasattr(model, "split"):
        check_hooks(model)
    if "StaticFunction" in type(model.forward).__name__:
        raise UnsupportedError(COMPILED_WHOLE)


def _around(mesh: Mesh, split: TokenSplit, exchange: str, output: str) -> Callable[[Any], Any] | None:
    """What is wrapped around every attention: keys shared within, heads without."""
    if mesh.sequence.size == 1:
        return None

    return lambda attend: shared(attend, mesh.ring, mesh.ulysses, exchange, output, split.shares)


def shared(attend: Any, keys: Group, heads: Group, exchange: str, output: str, shares: Sequence[int] | None) -> Any:
    """An attention whose keys are shared by one group of ranks and whose heads by another.

    shares: tokens of every rank of the sequence, a group of heads after the other; None asks the others at every call.
    """
    size, first = heads.size, keys.rank * heads.size
    if keys.size > 1:
        parts = None if shares is None else [sum(shares[part * size:(part + 1) * size]) for part in range(keys.size)]
        attend = ring(attend, keys, exchange, parts)
    if heads.size > 1:
        attend = ulysses(attend, heads, exchange, output, None if shares is None else shares[first:first + size])
    return attend


def _say_unequal_memory(handle: Parallel) -> None:
    everyone = handle.values(handle._runtime.memory_gib(handle._like))
    if len({None if one is None else round(one) for one in everyone}) > 1 and handle.rank == 0:
        listed = ", ".join(f"{one:.0f} GiB on rank {rank}" for rank, one in enumerate(everyone) if one is not None)
        warnings.warn(f"the GPUs have unequal memory ({listed}); the smallest one limits what fits", stacklevel=3)
