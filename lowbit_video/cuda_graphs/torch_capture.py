"""A forward as CUDA graphs: what it launches is recorded once for each kind of call, and launched as one from then on."""
from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from .stale import Stale

WARM = 3
"""Calls before one is recorded: what is compiled, planned or chosen by trial is so in these."""
SAME = 0.02
"""How far, relative and absolute, a replay's values may lie from the plain forward's."""
MOST_KINDS = 16
"""Kinds of call that are kept; when there are more, the oldest goes."""


def captured(work: Callable[[], Any], pool: Any = None, warm: int = WARM) -> tuple[Any, Callable[[], None]]:
    """(what `work` gives on the current GPU, where each replay writes it anew; the replay).

    pool: memory that graphs share (`torch.cuda.graph_pool_handle()`); None: of its own. warm: calls before.
    Raises UnsupportedError where work does what no graph can hold.
    """
    before, stream = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
    stream.wait_stream(before)
    with torch.cuda.stream(stream):  # the graph's own, for what is kept by stream
        for _ in range(warm):
            work()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # NCCL's watchdog asks after events in another thread, which is no fault of this one
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = work()
    except RuntimeError as error:
        raise UnsupportedError(f"no CUDA graph can hold this forward: {error}\nsupported is what never waits for the GPU, "
                               "copies nothing from the host and ran alike before; leave cuda_graph out, or compile the blocks "
                               "(block.compile()), which takes less of the host too") from error
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
    return out, graph.replay


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """That which graphs of a device are recorded on: only those of one stream share memory."""
    return torch.cuda.Stream(device)


class Graphed:
    """A forward without gradients as a CUDA graph of each kind of call, recorded when that is first seen.

    forward: takes and gives tensors, in dicts, lists and tuples, and anything else that is hashable; kinds of call differ in
    anything but the values of tensors. counts: what it has counted (`counted.Counts`), or None. pool: as `captured`; capture:
    as that. still: whether what was recorded is what the forward would do now, asked while the GPU replays it; None: it is.
    What it is given and gives are tensors of the caller's own, not the graph's. The call that records gives what the plain
    forward gave. Raises UnsupportedError for arguments that no graph can hold; AssertionError where the graph gives other
    values than the forward.
    """

    def __init__(self, forward: Callable, counts: Callable[[], Any] | None = None, pool: Any = None,
                 capture: Callable | None = None, still: Callable[[], bool] | None = None) -> None:
        self.forward, self.counts, self.pool, self.capture, self.still = forward, counts, pool, capture or captured, still
        self.kinds: dict[tuple, tuple] = {}

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self.of(None, *args, **given)

    def of(self, what: Hashable, *args: Any, **given: Any) -> Any:
        """A call whose kind differs by `what`, too: by what a forward depends on beside its arguments.

        Raises Stale, and waits for what was replayed, where `still` says no; nothing is counted then.
        """
        leaves, tree = pytree.tree_flatten((args, given))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise UnsupportedError("gradients of what the forward is given are asked for, and a replayed CUDA graph has none; "
                                   "call under torch.no_grad(), or without cuda_graph")
        kind = (what, tree, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), *(
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))
        with torch.no_grad():
            known = self.kinds.get(kind)
            if known is not None:
                held, out, replay, counted = known
                for own, tensor in zip(held, tensors):
                    own.copy_(tensor)
                replay()
            if self.still is not None and not self.still():
                _wait()
                raise Stale
            if known is None:
                return self._record(kind, leaves, tree)
            if counted is not None:
                counted.add()
            return pytree.tree_map(_own, out)

    def clear(self) -> None:
        """Forgets all graphs, whose memory is free again."""
        self.kinds.clear()

    def _record(self, kind: tuple, leaves: list[Any], tree: Any) -> Any:
        """What the plain forward gives; its graph is kept under `kind`."""
        with torch.inference_mode(False):
            own = [leaf.detach().contiguous().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        held = [leaf for leaf in own if isinstance(leaf, torch.Tensor)]
        args, given = pytree.tree_unflatten(own, tree)

        def work() -> Any:
            for tensor in held:  # what the host read of one is read again, which the capture refuses, and is in no graph
                torch.autograd.graph.increment_version(tensor)
            with _uncached():
                return self.forward(*args, **given)

        before = None if self.counts is None else self.counts()
        plain = pytree.tree_map(_own, work())
        for leaf in pytree.tree_leaves(plain):
            if not (leaf is None or isinstance(leaf, torch.Tensor)):
                raise UnsupportedError(f"the forward gives a {type(leaf).__name__}, and a CUDA graph gives tensors alone; ask "
                                       "for return_dict=False")
        counted = None
        if before is not None:
            after = self.counts()
            counted = after.since(before)
        try:
            out, replay = self.capture(work, self.pool)
            replay()
        finally:
            if counted is not None:
                after.restore()
        for found, wanted in zip(pytree.tree_leaves(out), pytree.tree_leaves(plain)):
            torch.testing.assert_close(found, wanted, rtol=SAME, atol=SAME, equal_nan=True,
                                       msg=lambda text: f"the CUDA graph gives other values than the plain forward: {text}")
        if len(self.kinds) >= MOST_KINDS:
            warnings.warn(f"more than {MOST_KINDS} kinds of call are CUDA graphs, and the oldest is forgotten; what changes "
                          "from call to call is to be a tensor, not a number", stacklevel=4)
            del self.kinds[next(iter(self.kinds))]
        self.kinds[kind] = held, out, replay, counted
        return plain


def _wait() -> None:
    """For the current GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _uncached() -> contextlib.AbstractContextManager:
    """Autocast as it is, but that no cast is kept between calls: a graph would read that of the weights of now for good."""
    if not torch.is_autocast_enabled("cuda"):
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)


def _own(leaf: Any) -> Any:
    """The caller's copy of what a graph writes."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
