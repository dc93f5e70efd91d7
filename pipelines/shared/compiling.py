"""A transformer's blocks as one compiled graph, in which attention stays an operator; its errors come out as themselves."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import paddle

from lowbit_video.graph.failures import take_failure
from lowbit_video.hook.base import slot_of
from lowbit_video.hook.report import attention_modules


def compiled(transformer: paddle.nn.Layer) -> paddle.nn.Layer:
    """The transformer, its `run_blocks` compiled; attention stays one operator that runs the processor set at the time.

    What surrounds the blocks stays eager: several ranks share out tokens there, and no graph can hold their exchange.
    """
    for module in attention_modules(transformer).values():
        slot_of(module, module.to_q.weight)
    transformer.run_blocks = paddle.jit.to_static(transformer.run_blocks, full_graph=True)
    return transformer


@contextlib.contextmanager
def readable_failures() -> Iterator[None]:
    """Errors raised inside a compiled graph come out as themselves, not as Paddle's SystemError."""
    take_failure()
    try:
        yield
    except (SystemError, RuntimeError, OSError, ValueError) as error:
        failure = take_failure()
        if failure is None or failure is error or failure is error.__cause__:
            raise
        raise failure from error
