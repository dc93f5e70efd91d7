"""Attention as one operator of Paddle's static graphs.

`paddle.jit.to_static` would trace through the Python that quantises and launches kernels, or break
the graph at it. A registered operator is opaque: the graph holds one `lowbit_attention` per module,
with any batch, length, heads and head dim, and runs the module's processor eagerly when it is reached.
So a processor set after the compilation is the one that runs, and calls are counted as in eager mode.
"""
from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import paddle

_keys = itertools.count(1)
_runners: weakref.WeakValueDictionary[str, Runner] = weakref.WeakValueDictionary()
_failure: list[BaseException] = []


class Runner:
    """Runs one attention module's attention; a graph knows it by `key`, its owner keeps it alive.

    run: `run(q, k, v)` or `run(q, k, v, mask)` on eager [B, N, H, D] tensors.
    """

    def __init__(self, run: Callable) -> None:
        self.run = run
        self.key = f"attention_{next(_keys)}"  # a string: SOT makes a tensor of an integer that it sees vary
        _runners[self.key] = self


def _run(key: str, *tensors: paddle.Tensor) -> paddle.Tensor:
    runner = _runners.get(key)
    if runner is None:
        raise RuntimeError("a compiled graph calls the attention of a model that is gone; compile the model that is in use")
    try:
        # The executor takes the output's memory and drops its strides: it must be contiguous.
        return runner.run(*tensors).contiguous()
    except BaseException as error:  # Ctrl-C as well: the executor swallows it
        remember(error)
        raise


def remember(error: BaseException) -> None:
    """Keeps an error for `take_failure`."""
    _failure[:] = [error]


def take_failure() -> BaseException | None:
    """The last error raised inside the operator, once: Paddle's executor shows it as a bare SystemError."""
    return _failure.pop() if _failure else None


def like_query(q, k, v, key):
    """The output's shape and dtype: those of q."""
    return paddle.static.MetaTensor(shape=q.shape, dtype=q.dtype)


def _like_query_masked(q, k, v, mask, key):
    return paddle.static.MetaTensor(shape=q.shape, dtype=q.dtype)


@paddle.static.register_op(name="lowbit_attention", infer_meta=like_query, input_names=["q", "k", "v"], output_names=["out"])
def attention_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> paddle.Tensor:
    """Attention of [B, N, H, D] tensors by the runner of that key; the output is q's shape and dtype."""
    return _run(key, q, k, v)


@paddle.static.register_op(name="lowbit_attention_masked", infer_meta=_like_query_masked,
                           input_names=["q", "k", "v", "mask"], output_names=["out"])
def masked_attention_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: paddle.Tensor, key: str) -> paddle.Tensor:
    """The same under a mask."""
    return _run(key, q, k, v, mask)
