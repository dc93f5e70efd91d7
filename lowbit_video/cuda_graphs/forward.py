"""`cuda_graph()`: a model's forward launched as one CUDA graph, so that the host's part of a step is a few launches.

A transformer launches a thousand kernels a step. Where the GPU is done with them sooner than the host has launched the next, as
where several GPUs share a step, the host sets the pace; a graph is launched at once, transfers between ranks with it.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from ..hook.report import active_backend, transformer_of
from .stale import Stale

ADAPTER = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
"""What PEFT's layers keep of the adapters (LoRA) that they add."""
INSTEAD = "compile the blocks instead: pipe.compile() those of lowbit_video's pipelines, block.compile() those of diffusers'"


class CudaGraph:
    """What `cuda_graph` puts in the place of a model's forward; `undo()`, or leaving it as a context manager, takes it back."""

    def __init__(self, model: Any) -> None:
        from .counted import counts_of
        from .torch_capture import Graphed

        self._model, self._plain, self._own = model, model.forward, vars(model).get("forward")
        functools.update_wrapper(self, self._plain)  # so that its signature can be read
        self._setting: Setting | None = None
        self._graphed: Graphed | None = Graphed(self._plain, lambda: counts_of(model), still=self._still)

    def __call__(self, *args: Any, **given: Any) -> Any:
        """The model's forward."""
        import torch

        if self._graphed is None:
            return self._plain(*args, **given)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._model.parameters()):
            raise UnsupportedError("gradients of the model's weights are asked for, and a replayed CUDA graph has none; call "
                                   "it under torch.no_grad(), or undo() the graph")
        if self._setting is not None and _elsewhere(args, given, self._setting.device) is None:
            with contextlib.suppress(Stale):
                return self._replayed(args, given)
        setting = Setting.of(self._model, hold=True)
        if (odd := _elsewhere(args, given, setting.device)) is not None:
            raise UnsupportedError(f"argument {odd[0]} of the forward is on {odd[1].device} and the model on {setting.device}: "
                                   "a CUDA graph would read its values once and for all; move it first")
        self._graphed.clear()
        self._graphed.pool, self._setting = _new_pool(), setting
        return self._replayed(args, given)

    def _replayed(self, args: tuple, given: dict[str, Any]) -> Any:
        """By the graph of this kind of call. Raises Stale where what it was recorded with is not what is there."""
        with _on(self._setting.device):
            return self._graphed.of(self._setting.spans(), *args, **given)

    def _still(self) -> bool:
        """Whether the model is what it was when graphs were recorded; asked while the GPU is at one."""
        return self._setting.same(Setting.of(self._model))

    def undo(self) -> None:
        """The model launches its kernels one by one again, and the graphs' memory is free."""
        if self._graphed is None:
            return
        self._graphed = self._setting = None
        if vars(self._model).get("forward") is self:  # else others have wrapped it since, and what they call passes on
            if self._own is None:
                del self._model.forward
            else:
                self._model.forward = self._own

    def __enter__(self) -> CudaGraph:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self._plain, memo)  # a copied model has its own memory, and no graph


def cuda_graph(pipe_or_model: Any) -> CudaGraph:
    """Launches a model's forward as CUDA graphs, from the second call of each kind on; PyTorch on an NVIDIA GPU, for inference.

    pipe_or_model: a pipeline, whose transformer is meant, or a model; all of it on one GPU.
    returns: a handle; `undo()` gives the forward back, and is to be called before the process group of several ranks ends.

    The first call of a kind (shapes, dtypes and whatever among the arguments is no tensor) runs the forward several times, to
    record it and to see that the graph gives the same values; that takes as long as some ten steps. `apply`, `parallelize`,
    `order_tokens`, compiled blocks and other processors may come before or after: what was recorded with other ones, other
    hooks or weights elsewhere is forgotten, and recorded anew. A recipe has a graph for each way in which its steps differ. On
    several ranks all must call it, and change the model, alike; all record at the same call. What is counted (`coverage`,
    `Parallel.report()`) is as without graphs. Graphs hold the memory of one forward's tensors, as many kinds as there are
    sharing it, beside copies of what the forward is given.
    Raises UnsupportedError for Paddle's models, a model that is not on one GPU and one compiled as a whole, ValueError for one
    that has graphs already; in a call UnsupportedError where gradients are asked for, for tensors elsewhere and for a forward
    that waits for the GPU, AssertionError where a graph gives other values than the forward.
    """
    model = transformer_of(pipe_or_model)
    _check_model(model)
    model.forward = handle = CudaGraph(model)
    return handle


@dataclass
class Setting:
    """What a model's forward depends on beside its arguments, to be compared before each call: modules, their hooks (by which
    tokens are ordered and shared, too), processors with what is around them, adapters, and where weights lie.

    objects: by identity; the Setting keeps them alive, so that no other has their place. values: by value. device: of the
    model. recipes: attentions by their plans, of those that differ from step to step. held: memory of the weights: if they have
    moved since, a graph still reads it, once, before that is seen.
    """

    objects: list[Any]
    values: list[Any]
    device: Any
    recipes: dict[Any, Any]
    held: list[Any]

    @classmethod
    def of(cls, model: Any, hold: bool = False) -> Setting:
        """That of a model now. hold: with its weights' memory."""
        objects: list[Any] = []
        values: list[Any] = [active_backend()]
        device, recipes, held = None, {}, []
        for module in model.modules():
            own = vars(module)
            objects += [module, *own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values()]
            if not isinstance(forward := own.get("forward"), CudaGraph):
                objects.append(forward)
            objects.append(own.get("_compiled_call_impl"))
            values.append(own["training"])
            if "scaling" in own:
                values.append(str([own.get(name) for name in ADAPTER]))
            for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
                objects.append(tensor)
                if tensor is not None:
                    device = device or tensor.device
                    values.append(_address(tensor))
                    held += [tensor.untyped_storage()] if hold and values[-1] else []
            if (processor := own.get("processor")) is not None:
                dispatched = getattr(own.get("attention_calls"), "attention", None)
                objects += [processor, getattr(processor, "__dict__", {}).get("attend"), dispatched,
                            getattr(own.get("attention_slot"), "around", None)]
                values.append(str(getattr(processor, "_attention_backend", None)))
                for attention in (processor, dispatched):
                    if (plan := getattr(attention, "plan", None)) is not None and len(plan.spans) > 1:
                        recipes[plan] = attention
        return cls(objects, values, device, recipes, held)

    def spans(self) -> Hashable:
        """Which rungs the recipe has in the step of this call, layer by layer.

        Where the step is not told (`denoising_step`) the host waits for the timestep, as without a graph.
        """
        return tuple(plan.now(attention.clock) for plan, attention in self.recipes.items())

    def same(self, other: Setting) -> bool:
        """Whether a graph recorded with this is one of that."""
        return (self.values == other.values and len(self.objects) == len(other.objects) and
                all(map(operator.is_, self.objects, other.objects)))


def _address(tensor: Any) -> int:
    """Where a tensor's values lie; 0 for one of a class of its own (quantised, say), which may not tell."""
    import torch

    return tensor.data_ptr() if type(tensor) in (torch.Tensor, torch.nn.Parameter) else 0


def _check_model(model: Any) -> None:
    if isinstance(model.forward, CudaGraph):
        raise ValueError(f"the forward of this {type(model).__name__} is a CUDA graph already; undo() that one first")
    if not hasattr(model, "named_modules") or hasattr(model, "named_sublayers"):
        raise UnsupportedError(f"{type(model).__name__} is no PyTorch model, and CUDA graphs are recorded of PyTorch's alone; "
                               f"{INSTEAD}")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedError(f"the whole forward of this {type(model).__name__} is compiled; compile its blocks one by one "
                               "(block.compile()), which a graph holds too")
    devices = _devices(model)
    if len(devices) != 1 or _type_of(devices[0]) != "cuda":
        there = ", ".join(map(str, devices)) or "no device"
        raise UnsupportedError(f"the weights of this {type(model).__name__} are on {there}; a CUDA graph is of a model all of "
                               "which is on one NVIDIA GPU and stays there: move it (pipe.to('cuda')), leave offloading out")


def _devices(model: Any) -> list[Any]:
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def _type_of(device: Any) -> str:
    return device.type


def _elsewhere(args: tuple, given: dict[str, Any], device: Any) -> tuple[Any, Any] | None:
    """(name of the argument, tensor) of the first one that the graph would not read; None where it reads all."""
    named = _tensors((*args, *given.values()), (*range(len(args)), *given))
    return next(((name, value) for name, value in named if value.device != device), None)


def _tensors(values: tuple, names: tuple) -> Iterator[tuple[Any, Any]]:
    """(name of the argument, tensor) of all tensors in it."""
    from torch.utils import _pytree as pytree

    for name, value in zip(names, values):
        yield from ((name, leaf) for leaf in pytree.tree_leaves(value) if hasattr(leaf, "data_ptr"))


def _new_pool() -> Any:
    import torch

    return torch.cuda.graph_pool_handle()


def _on(device: Any) -> Any:
    import torch

    return torch.cuda.device(device)
