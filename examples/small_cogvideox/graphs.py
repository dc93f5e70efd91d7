"""The transformer as CUDA graphs: one launch a pass instead of a thousand, in training and in a video's denoising."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from run import Run
from torch.utils import _pytree as pytree

GRAPHED = 4096  # latents of a clip, four a token, up to which it is worth it
SAME = 0.02  # relative distance up to which two bf16 predictions are one
WARM = 3  # calls before one is captured: what is compiled, planned or chosen by trial is so in these


class Predict(torch.nn.Module):
    """The transformer on noisy latents, text features and times, bf16 on a GPU: what a CUDA graph can hold for one clip length.

    `rotations` of the video tokens, for a model that takes them. No cast is kept between calls, or a graph would replay the
    weights of the step that it was made in."""

    def __init__(self, transformer, rotations=None):
        super().__init__()
        self.transformer, self.rotations = transformer, rotations

    def forward(self, noisy: torch.Tensor, text: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.is_cuda, cache_enabled=False):
            rotations = {} if self.rotations is None else {"image_rotary_emb": self.rotations}
            return self.transformer(noisy, text, times, return_dict=False, **rotations)[0].float()


def graphed(run: Run, plain: Predict, inputs: tuple[torch.Tensor, ...]):
    """`plain` as CUDA graphs of its forward and backward pass: launching its thousand kernels one by one takes longer than
    running them. `plain` itself where that is not asked for, fails or gives other values, and for clips of so many tokens that
    launching costs little beside them."""
    if not (run.args.graphs and run.device.type == "cuda" and run.args.text_rate <= 0) or inputs[0][0, :, 0].numel() > GRAPHED:
        return plain
    start = time.time()
    try:
        made = torch.cuda.make_graphed_callables(Predict(plain.transformer, plain.rotations), inputs, allow_unused_input=True)
        apart = difference(made, plain, inputs)
    except Exception as error:
        run.log.say(f"no CUDA graph, going on without: {type(error).__name__}: {str(error)[:300]}")
        torch.cuda.synchronize()
        return plain
    run.log.say(f"CUDA graphs made in {time.time() - start:.1f} s, {apart:.4f} from the plain transformer")
    return made if apart < SAME else plain


def difference(first, second, inputs: tuple[torch.Tensor, ...]) -> float:
    """How far two predictions lie apart, as a share of the second's size."""
    one = first(*inputs).detach().clone()
    other = second(*inputs).detach()
    return float((one - other).norm() / other.norm().clamp_min(1e-6)) if torch.isfinite(one).all() else math.inf


def captured(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """(what `work` gives on the GPU, where each replay writes it anew; the replay)."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return out, graph.replay


class Graphed:
    """A forward without gradients as a CUDA graph of each kind of call, made when that is first seen; what it is given and
    gives are tensors of the caller's own, not the graph's. capture: as `captured`.

    Kinds differ in anything but the values of tensors: what else a forward depends on must stay as it is.
    """

    def __init__(self, forward: Callable, capture: Callable = captured):
        self.forward, self.capture, self.kinds = forward, capture, {}

    def __call__(self, *args, **given):
        leaves, tree = pytree.tree_flatten((args, given))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        kind = (tree, *((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves))
        if kind not in self.kinds:
            self.kinds[kind] = self._made(leaves, tree)
        held, out, replay = self.kinds[kind]
        for own, tensor in zip(held, tensors):
            own.copy_(tensor)
        replay()
        return pytree.tree_map(torch.clone, out)

    def _made(self, leaves, tree) -> tuple[list[torch.Tensor], Any, Callable[[], None]]:
        """(the tensors that a graph reads, what it writes, its replay). Raises AssertionError where it gives other values."""
        own = [leaf.contiguous().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, given = pytree.tree_unflatten(own, tree)
        plain = pytree.tree_map(torch.clone, self.forward(*args, **given))
        out, replay = self.capture(lambda: self.forward(*args, **given))
        replay()
        for found, wanted in zip(pytree.tree_leaves(out), pytree.tree_leaves(plain)):
            torch.testing.assert_close(found, wanted, rtol=SAME, atol=SAME)
        return [leaf for leaf in own if isinstance(leaf, torch.Tensor)], out, replay
