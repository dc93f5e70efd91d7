"""`SplitByHooks`: a diffusers transformer made to share its tokens by forward hooks, as ours does by its `split`.

Nothing of the model is changed: PyTorch calls the hooks, and takes them off again. Serves models that hand their blocks
hidden_states, encoder_hidden_states and image_rotary_emb by name and end in proj_out, as CogVideoXTransformer3DModel does.
"""
from __future__ import annotations

import inspect
from typing import Any

from ..errors import UnsupportedError
from .split import TokenSplit

CUT = ("hidden_states", "encoder_hidden_states", "timestep", "timestep_cond", "ofs")
"""Arguments of the model's forward, in their order, that hold a row for each half of the guidance."""
SHARED = ("self", *CUT, "image_rotary_emb", "attention_kwargs", "return_dict")
"""All arguments of a forward whose work the hooks know how to share."""


def check_hooks(model: Any) -> None:
    """Raises UnsupportedError for a model that computes from more than what `SplitByHooks` shares, naming it."""
    unknown = [name for name in inspect.signature(type(model).forward).parameters if name not in SHARED]
    if unknown:
        raise UnsupportedError(f"{type(model).__name__} cannot share its tokens: its forward takes {', '.join(unknown)}, and "
                               "hooks share only what CogVideoXTransformer3DModel's takes; a model that diffusers has a plan "
                               "for (its _cp_plan) can take model.enable_parallelism(config=...) and a backend of diffusers' "
                               "dispatcher")


class SplitByHooks:
    """The hooks of one model. `remove()` takes them off."""

    def __init__(self, model: Any, split: TokenSplit) -> None:
        self.split, self._batch, self._rotary = split, 0, None
        first = model.transformer_blocks[0]
        self._hooks = [
            model.register_forward_pre_hook(self._take_half, with_kwargs=True), model.register_forward_hook(self._join_halves),
            *(block.register_forward_pre_hook(self._take_tokens if block is first else self._take_rotary, with_kwargs=True)
              for block in model.transformer_blocks),
            # before what else is done to whole tokens there: they are put in raster order again (hook/order.py)
            model.proj_out.register_forward_hook(lambda module, given, video: split.join_tokens(video), prepend=True)]

    def remove(self) -> None:
        """The model computes alone again."""
        for hook in self._hooks:
            hook.remove()

    def _take_half(self, model: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
        named = {**named, **dict(zip(CUT, given))}
        names = [name for name in CUT if name in named]
        self._batch = named["hidden_states"].shape[0]
        named.update(zip(names, self.split.take_half(*(named[name] for name in names))))
        return given[len(CUT):], named

    def _join_halves(self, model: Any, given: tuple, out: Any) -> Any:
        sample = self.split.join_halves(out[0], self._batch)
        return (sample,) if isinstance(out, tuple) else type(out)(sample=sample)

    def _take_tokens(self, block: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
        text, video, self._rotary = self.split.take_tokens(
            named["encoder_hidden_states"], named["hidden_states"], named.get("image_rotary_emb"))
        return given, {**named, "encoder_hidden_states": text, "hidden_states": video, "image_rotary_emb": self._rotary}

    def _take_rotary(self, block: Any, given: tuple, named: dict) -> tuple[tuple, dict]:
        return given, {**named, "image_rotary_emb": self._rotary}
