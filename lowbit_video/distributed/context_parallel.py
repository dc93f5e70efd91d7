"""`cp_plan()`: diffusers' own `enable_parallelism` for hooked CogVideoX, of which diffusers has no plan.

    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2), cp_plan=lowbit_video.cp_plan(model))

diffusers cuts the tokens and joins them again, as the plan says; the hooked attention exchanges them, by heads and in a ring.
`parallelize` does more (guidance, codes of uneven shares, taking it back); this is for who runs several models one way.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedError
from ..hook.base import AttnProcessor, slot_of
from ..hook.frames.cogvideox import joint_attention
from ..hook.report import attention_modules, named_modules, transformer_of
from .exchange import check_exchange
from .group import Group, Traffic
from .parallelize import shared
from .torch_model import check_hooks


def cp_plan(pipe_or_model: Any, exchange: str = "auto", output: str = "16bit") -> dict[str, Any]:
    """What `enable_parallelism(config=..., cp_plan=...)` of a hooked CogVideoX model takes, on every rank alike.

    pipe_or_model: diffusers' pipeline, or its transformer, every attention module of which has a processor of this project.
        Its text tokens and its video tokens must each divide by the number of ranks, unless the config says `ulysses_anything`
        or `ring_anything`.
    exchange, output: as in `parallelize`.
    Hooks can neither be applied nor removed after that: diffusers does not take parallelism back.
    Raises UnsupportedError for a model of another kind, or without hooks; ValueError for an exchange that does not exist.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    check_exchange(exchange, output)
    model = transformer_of(pipe_or_model)
    check_hooks(model)
    parts = {"": model, **dict(named_modules(model))}
    slots = []
    for name, module in attention_modules(model).items():
        if not isinstance(module.processor, AttnProcessor):
            raise UnsupportedError(f"{name} of {type(model).__name__} has no processor of lowbit_video, and diffusers' own "
                                   "does not exchange tokens; call lowbit_video.apply(model, ...) first, \"exact\" where "
                                   "nothing is to be at low bit")
        slots.append(slot_of(module, module.to_q.weight, owner=parts[name.rpartition(".")[0]]))
        if slots[-1].frame is not joint_attention:
            raise UnsupportedError(f"{name} of {type(model).__name__} is not CogVideoX's joint attention, which the plan is of")
        if slots[-1].around is not None:
            raise UnsupportedError(f"this {type(model).__name__} is parallel already; call unparallelize first")
    for slot in slots:
        slot.shared_by = lambda config: _around(config, exchange, output)
    tokens = ContextParallelInput(split_dim=1, expected_dims=3)
    angles = ContextParallelInput(split_dim=0, expected_dims=2)
    return {"transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
            "transformer_blocks.*": {"image_rotary_emb": [angles, angles]},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}


def _around(config: Any, exchange: str, output: str) -> Callable[[Any], Any]:
    """What is wrapped around every attention for a diffusers ParallelConfig: keys shared within, heads without."""
    import torch.distributed as dist

    from .torch_wire import TorchWire

    config = config.context_parallel_config
    ranks = lambda mesh: dist.get_process_group_ranks(mesh.get_group())
    wire, traffic = TorchWire(), Traffic()
    keys, heads = (Group(wire, ranks(mesh), traffic) for mesh in (config._ring_mesh, config._ulysses_mesh))
    uneven = config.ulysses_anything or config.ring_anything

    def around(attend: Any) -> Any:
        def run(q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None, return_lse: bool = False) -> Any:
            shares = None if uneven else [q.shape[1]] * (keys.size * heads.size)
            return shared(attend, keys, heads, exchange, output, shares)(q, k, v, is_causal, scale, return_lse)

        return run

    return around
