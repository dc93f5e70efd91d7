"""`TokenSplit`: this rank's half of the guidance and share of the tokens, taken where a model begins and joined at its end."""
from __future__ import annotations

import warnings
from typing import Any

from ..errors import UnsupportedError
from ..graph.tracing import traced_by_paddle
from ..hook.base import AttnProcessor
from ..hook.report import attention_modules
from ..runtime.detect import runtime_of
from .mesh import Mesh
from .shares import begins, joint_shares

COMPILED_WHOLE = ("the whole forward of a model that several ranks share is compiled, and no graph can hold their exchange; "
                  "compile with pipe.compile(), which leaves the exchange outside, or not at all")


class TokenSplit:
    """What a model calls in its forward: `take_half` before anything, `take_tokens` when there are tokens, and in the end
    `join_tokens` and `join_halves`.

    model: its attention modules are looked at before every forward. mesh: groups cfg and sequence. shares: text and video
    tokens of each rank of the sequence, in the forward under way.
    A copy of a model computes alone: the copy of its split is None.
    """

    def __init__(self, model: Any, mesh: Mesh) -> None:
        self.cfg, self.sequence = mesh.cfg, mesh.sequence
        self._modules = attention_modules(model)
        self.shares: list[int] = []
        self._video_shares: list[int] = []
        self._warned = False

    def take_half(self, *tensors: Any) -> tuple[Any, ...]:
        """The rows of this rank's half of the guidance.

        tensors: the first is [B, ...], negative prompts before positive ones; others that have B rows are cut too, and the
        rest (None, numbers, [1, ...]) stay. Where B is odd there is no guidance to share: all stay, and one warning says so.
        """
        if traced_by_paddle(tensors[0]):
            raise UnsupportedError(COMPILED_WHOLE)
        batch = tensors[0].shape[0]
        if self.cfg.size == 1:
            return tensors
        if batch % 2:
            if not self._warned:
                warnings.warn(f"cfg 2 gains nothing here: a batch of {batch} has no guidance whose halves two groups of ranks "
                              "could take, so both compute all of it; use cfg 1 and more ranks for the sequence "
                              "(--cfg-degree 1 --ulysses-degree N)", stacklevel=3)
                self._warned = True
            return tensors
        half = slice(self.cfg.rank * batch // 2, (self.cfg.rank + 1) * batch // 2)
        return tuple(t[half] if hasattr(t, "shape") and len(t.shape) and t.shape[0] == batch else t for t in tensors)

    def take_tokens(self, text: Any, video: Any, rotary: tuple[Any, Any] | None) -> tuple[Any, Any, tuple[Any, Any] | None]:
        """This rank's share of text tokens [B, N_text, C], video tokens [B, N_video, C] and (cos, sin), each [N_video, D].

        Raises UnsupportedError for an attention processor that would attend within the share alone, ValueError where there
        are too few tokens to share.
        """
        if self.sequence.size == 1:
            return text, video, rotary
        for name, module in self._modules.items():
            if not isinstance(module.processor, AttnProcessor):
                raise UnsupportedError(
                    f"{name} has the processor {type(module.processor).__name__}, which is not one of lowbit_video: it would "
                    "attend to this rank's share of the tokens alone; set ExactAttnProcessor() or LowBitAttnProcessor(...), or "
                    "a subclass of AttnProcessor whose `attend` computes what it computes")
        place = self.sequence.rank
        shares = joint_shares(text.shape[1], video.shape[1], self.sequence.size)
        cuts = [slice(begins(share)[place], begins(share)[place] + share[place]) for share in shares]
        self._video_shares, self.shares = shares[1], [sum(both) for both in zip(*shares)]
        rotary = None if rotary is None else tuple(table[cuts[1]] for table in rotary)
        return text[:, cuts[0]], video[:, cuts[1]], rotary

    def join_tokens(self, video: Any) -> Any:
        """[B, N_video, C] of all shares' results [B, n, C], on every rank."""
        if self.sequence.size == 1:
            return video
        runtime = runtime_of(video)
        rows = runtime.contiguous(video.moveaxis(1, 0))
        parts = self.sequence.all_gather_rows(rows, self._video_shares, runtime, "prediction")
        return runtime.concat(parts, 0).moveaxis(0, 1)

    def join_halves(self, prediction: Any, batch: int) -> Any:
        """[batch, ...] of both halves' results, on every rank; what is of the whole batch already stays."""
        if prediction.shape[0] == batch:
            return prediction
        runtime = runtime_of(prediction)
        return runtime.concat(self.cfg.all_gather(prediction, runtime, "guidance"), 0)

    def __reduce__(self) -> tuple:
        return type(None), ()
