"""What it saves to read text and video in two pieces: projections, concatenation and the fused prologue, everything counted.

`prologue` runs this for each of its cases. One piece: hidden states concatenated, then projected. Two: each stream projected,
nothing concatenated; text's products are launches of their own.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowbit_video.engine.run import run
from lowbit_video.engine.workspace import layout_workspace
from lowbit_video.kernels.prologue.steps import Rest

TEXT_TOKENS = 226
"""CogVideoX's."""


class Pieces:
    """Both ways from hidden states to codes.

    made: of `prologue.Made`, whose case, steps and options they have. text_tokens: of the case's tokens, the first ones.
    """

    def __init__(self, made: Any, text_tokens: int = TEXT_TOKENS) -> None:
        self.made, case = made, made.case
        self.seam = min(text_tokens, case.tokens - 1)
        self.width = case.heads * case.head_dim
        self.text, self.video = (made.normal([case.batch, tokens, self.width], made.q, seed)
                                 for seed, tokens in ((11, self.seam), (12, case.tokens - self.seam)))
        wide, square = 3 * self.width, self.width
        shapes = [wide] if case.projection else [square] * 3
        transposed = made.runtime.NAME == "paddle"  # [in, out] there
        self.weights = [made.normal([1, out, square], made.q, 13 + number).reshape([square, out] if transposed else
                                                                                   [out, square]) * square**-0.5
                        for number, out in enumerate(shapes)]

    def projected(self, tokens: Any) -> list[Any]:
        """q, k and v [B, N, H, D] of hidden states [B, N, C]."""
        case, linear = self.made.case, self.made.framework.nn.functional.linear
        parts = [linear(tokens, weight) for weight in self.weights]
        shape = [case.batch, int(tokens.shape[1])]
        if case.projection:
            whole = parts[0].reshape([*shape, 3, case.heads, case.head_dim])
            return [whole[:, :, part] for part in range(3)]
        return [part.reshape([*shape, case.heads, case.head_dim]) for part in parts]

    def joined(self) -> Any:
        return self.made.runtime.concat([self.text, self.video], 1)

    def calls(self, first: Sequence[Any], rest: Sequence[Any], whole: Sequence[Any]) -> tuple[Any, Any]:
        """The call of one piece, and that of two."""
        steps = self.made.steps
        return self.made.call(*whole, steps=steps), self.made.call(*first, steps=steps._replace(rest=Rest(*rest)))


def check(pieces: Pieces) -> dict[str, Any]:
    """The names of what the two calls leave otherwise, of the same values, and they must not in a single bit.

    Pieces as views of the whole, and as copies, whose strides are others.
    """
    made, seam, differ = pieces.made, pieces.seam, []
    whole = pieces.projected(pieces.joined())
    for copied in (False, True):
        place = (lambda x: x.clone()) if copied else (lambda x: x)
        one, two = pieces.calls([place(x[:, :seam]) for x in whole], [place(x[:, seam:]) for x in whole], whole)
        shape = (made.case.batch, made.case.heads, made.case.tokens, made.case.head_dim)
        parts = layout_workspace(shape, shape, one.options.precision, one.options.return_lse, fused=True).parts
        found = []
        for call in (one, two):
            made.guarded(call.quantise)()
            found.append(made.runtime.to_numpy(call.workspace))
        for name, (offset, dtype, of) in parts.items():
            size = int(np.prod(of)) * np.dtype(dtype.replace("float8_e4m3fn", "uint8")).itemsize
            if (found[0][offset:offset + size] != found[1][offset:offset + size]).any():
                differ.append(f"{name}{' of copies' * copied}")
    return dict(differ=differ, good=not differ)


def times(pieces: Pieces, timer: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds of the parts, of all up to codes, and of all with attention, in turns. saved: by two pieces."""
    from ..timing import time_together

    made = pieces.made
    text, video, joined = pieces.text, pieces.video, pieces.joined()
    first, rest, whole = pieces.projected(text), pieces.projected(video), pieces.projected(joined)
    one, two = pieces.calls(first, rest, whole)

    def all_of_one(then: Callable[..., Any]) -> None:
        then(pieces.projected(pieces.joined()), made.steps, one)

    def all_of_two(then: Callable[..., Any]) -> None:
        found = pieces.projected(text), Rest(*pieces.projected(video))
        then(found[0], made.steps._replace(rest=found[1]), two)

    codes = lambda tensors, steps, call: call.quantise()
    attention = lambda tensors, steps, call: run(*tensors, made.options, steps=steps)
    methods = {"concatenation": pieces.joined, "projections of one": lambda: pieces.projected(joined),
               "projections of two": lambda: (pieces.projected(text), pieces.projected(video)),
               "prologue of one": one.quantise, "prologue of two": two.quantise,
               "codes of one": lambda: all_of_one(codes), "codes of two": lambda: all_of_two(codes),
               "attention of one": lambda: all_of_one(attention), "attention of two": lambda: all_of_two(attention)}
    found = time_together(timer, {name: made.guarded(method) for name, method in methods.items()}, budget_ms=1e3 * seconds)
    ms = {name: round(timing.median_ms, 4) for name, timing in found.items()}
    return dict(ms=ms, host_us={name: round(found[name].host_us, 1) for name in ("attention of one", "attention of two")},
                saved_ms=round(ms["codes of one"] - ms["codes of two"], 4))
