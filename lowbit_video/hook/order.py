"""`order_tokens()`: a model's blocks see the video's tokens in another order, which is taken back at its end.

The order is taken once a call of the model, not in its layers: after the tokens have their positions, together with the rotary
tables, and back before they are a video again. Our transformer does so itself (`token_order`); diffusers' is made to by forward
hooks, and nothing of it is changed. Attention that is dense sums the same in another order; kernels that choose blocks of keys
choose compact ones.
"""
from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

from ..errors import UnsupportedError
from ..token_order import check_order
from .recipe.recipe import Recipe
from .report import transformer_of

HOOKED = ("diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel",)
"""Models, by class, that the hooks are right for: patch_embed makes tokens, text before video, and proj_out ends them."""
TAKES = ("hidden_states", "encoder_hidden_states", "timestep", "timestep_cond", "ofs", "image_rotary_emb", "attention_kwargs",
         "return_dict")
"""What the forward of these takes, in its order."""


class Ordered:
    """What one `order_tokens` changed; `remove()`, or leaving it as a context manager, takes it back."""

    def __init__(self, model: Any, before: str) -> None:
        self._model, self._before = weakref.ref(model), before

    def remove(self) -> None:
        """The order that was there before."""
        if self._model() is not None:
            _set(self._model(), self._before)

    def __enter__(self) -> Ordered:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def order_tokens(model_or_pipe: Any, order: str) -> Ordered:
    """Gives a model's blocks the video's tokens in an order of `token_order.ORDERS`.

    model_or_pipe: a pipeline, whose transformer is meant, or a CogVideoXTransformer3DModel, of `lowbit_video.pipelines` or of
        diffusers. Processors, recipes, `parallelize` and compiled blocks may come before or after; torch's compiled graphs are
        dropped (torch.compiler.reset), for they do not see that hooks come and go.
    order: "raster", as the model was trained and as it is left; "tiles", boxes of 4 frames by 2 by 2; "hilbert", along a curve.
    returns: a handle; `remove()` restores what was there, and so does `order_tokens(model, "raster")` what the model was.
    Warns where a recipe that the model has was calibrated with another order.
    Raises ValueError for an order that does not exist, UnsupportedError for a model that is not declared or whose whole forward
    Paddle compiled.
    """
    check_order(order)
    model = _plain(model_or_pipe)
    handle = Ordered(model, order_of(model))
    _set(model, order)
    for applied in getattr(model, "lowbit_applied", ()):
        warn_of_order(applied.recipe, model)
    return handle


def order_of(model_or_pipe: Any) -> str:
    """The order in which a model's blocks see the video's tokens."""
    model = _plain(model_or_pipe)
    hooks = getattr(model, "lowbit_order", None)
    return getattr(model, "token_order", "raster") if hooks is None else hooks.order


def warn_of_order(recipe: Recipe | None, model: Any) -> None:
    """Warns where a recipe says that it was calibrated with the tokens in another order than the model has them in."""
    meant, has = (recipe.about.get("order") if recipe else None), order_of(model)
    if meant not in (None, has):
        warnings.warn(f"{recipe.source} was calibrated with the tokens in the order {meant!r}, and this model has them in "
                      f"{has!r}: other keys lie in a tile, and pooled ones err more than the recipe promises; call "
                      f"lowbit_video.order_tokens(pipe, {meant!r}) first (on the command line --order {meant})", stacklevel=3)


def _plain(model_or_pipe: Any) -> Any:
    model = transformer_of(model_or_pipe)
    return getattr(model, "_orig_mod", model)  # what torch.compile wraps


def _set(model: Any, order: str) -> None:
    if hasattr(model, "token_order"):
        if "StaticFunction" in type(model.forward).__name__:
            raise UnsupportedError("the whole forward of this model is compiled, and its graph has the order of its tokens in "
                                   "it; order them first, or compile with pipe.compile(), which leaves the order outside")
        model.token_order = order
        return
    if not _is_declared(type(model)):
        raise UnsupportedError(f"{type(model).__module__}.{type(model).__qualname__} cannot have its tokens ordered: where it "
                               "makes them and what its blocks take for their places is not known; declared are the "
                               f"CogVideoXTransformer3DModel of lowbit_video.pipelines and {', '.join(HOOKED)}")
    hooks = getattr(model, "lowbit_order", None)
    if hooks is not None:
        hooks.remove()
        del model.lowbit_order
    if order != "raster":
        model.lowbit_order = OrderHooks(model, order)  # on the model, so that a copy has its own
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"].compiler.reset()


def _is_declared(cls: type) -> bool:
    """Whether it is a class of HOOKED, or one of its with the same forward."""
    return any(f"{base.__module__}.{base.__qualname__}" in HOOKED and cls.forward is base.forward for base in cls.__mro__)


class OrderHooks:
    """The hooks of one model. order: of its tokens. `remove()` takes them off."""

    def __init__(self, model: Any, order: str) -> None:
        self.order, self._grid = order, (0, 0, 0)
        self._hooks = [model.register_forward_pre_hook(self._begin, with_kwargs=True),
                       model.patch_embed.register_forward_hook(self._take),
                       model.proj_out.register_forward_hook(self._give_back)]

    def remove(self) -> None:
        """The model is as it was."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: Any, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Notes the grid of patches; the rotary tables [N_video, D] are ordered as their tokens will be."""
        named = {**dict(zip(TAKES, given)), **named}
        _, frames, _, height, width = named["hidden_states"].shape
        patch = model.config.patch_size
        self._grid = frames // (model.config.patch_size_t or 1), height // patch, width // patch
        if named.get("image_rotary_emb") is not None:
            named["image_rotary_emb"] = tuple(self._ordered(table, 0, False) for table in named["image_rotary_emb"])
        return (), named

    def _take(self, patch_embed: Any, given: tuple, tokens: Any) -> Any:
        """Text tokens as they are, then video tokens in order, [B, N_text + N_video, C]."""
        frames, height, width = self._grid
        text = tokens.shape[1] - frames * height * width
        import torch

        return torch.cat([tokens[:, :text], self._ordered(tokens[:, text:], 1, False)], 1)

    def _give_back(self, proj_out: Any, given: tuple, video: Any) -> Any:
        """What is predicted of video tokens [B, N_video, values], in raster order."""
        return self._ordered(video, 1, True)

    def _ordered(self, tensor: Any, axis: int, back: bool) -> Any:
        from ..graph import torch_ops as operators  # an import statement is what torch can follow

        return tensor.index_select(axis, operators.order_op(tensor, self.order, *self._grid, back))
