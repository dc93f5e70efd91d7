"""Sequences of different lengths packed along one token dimension: where each begins, checked."""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lowbit_video.kernels.buffers import Buffer, Origin
from lowbit_video.kernels.operands import Packed, Sequences

from ..arguments import whole
from ..runtime.protocol import Runtime

MAX_TOKENS = 2**31 - 1


class Packing(NamedTuple):
    """cu_q, cu_k: int32 [S + 1] tensors, sequence s has rows cu[s] to cu[s + 1]; max_q, max_k: tokens of the longest ones."""

    cu_q: Any
    cu_k: Any
    max_q: int
    max_k: int

    def check(self, runtime: Runtime) -> None:
        """Raises ValueError for beginnings or longest sequences that no batch could have, TypeError for no whole number."""
        for name, longest in (("max_seqlen_q", self.max_q), ("max_seqlen_k", self.max_k)):
            if whole(name, longest, 1) > MAX_TOKENS:
                raise ValueError(f"{name} is {longest}; int32 beginnings reach {MAX_TOKENS} tokens")
        shapes = [runtime.shape(cu) for cu in (self.cu_q, self.cu_k)]
        dtypes = [runtime.dtype_name(cu) for cu in (self.cu_q, self.cu_k)]
        if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0][0] < 2 or dtypes != ["int32", "int32"]:
            raise ValueError("cu_seqlens_q and cu_seqlens_k must be int32 of one length, [sequences + 1]; given: "
                             f"{dtypes[0]} {list(shapes[0])} and {dtypes[1]} {list(shapes[1])}")

    def count(self, runtime: Runtime) -> int:
        """Number of sequences."""
        return runtime.shape(self.cu_q)[0] - 1

    def contiguous(self, runtime: Runtime) -> Packing:
        """Itself, or with copies of the beginnings where they have strides: a kernel reads them without."""
        if all(runtime.strides(cu) == (1,) for cu in (self.cu_q, self.cu_k)):
            return self
        return self._replace(cu_q=runtime.contiguous(self.cu_q), cu_k=runtime.contiguous(self.cu_k))

    def operands(self) -> Packed:
        """The same as launchers take it."""
        sequences = ((self.cu_q, "cu_q", self.max_q), (self.cu_k, "cu_k", self.max_k))
        return Packed(*(Sequences(Buffer(cu.data_ptr(), "int32", Origin(name)), int(longest))
                        for cu, name, longest in sequences))

    def beginnings(self, runtime: Runtime, q_tokens: int, k_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Both as arrays; ValueError where they do not fit the tokens that are packed. Waits for a GPU."""
        return (_beginnings(runtime, "q", self.cu_q, q_tokens, self.max_q),
                _beginnings(runtime, "k", self.cu_k, k_tokens, self.max_k))


def _beginnings(runtime: Runtime, name: str, cu_seqlens: Any, tokens: int, longest: int) -> np.ndarray:
    values = runtime.to_numpy(cu_seqlens)
    if values[0] != 0 or values[-1] != tokens or (np.diff(values) < 0).any():
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to the {tokens} tokens that are packed; given: {values.tolist()}")
    if np.diff(values).max() > longest:
        raise ValueError(f"max_seqlen_{name} is {longest}, but a sequence has {np.diff(values).max()} tokens; a GPU would "
                         "leave the rest of it out")
    return values
