"""The transformer as CUDA graphs in training: one launch a pass instead of a thousand."""
from __future__ import annotations

import math
import time

import torch
from run import Run

GRAPHED = 4096  # latents of a clip, four a token, up to which it is worth it
SAME = 0.02  # relative distance up to which two bf16 predictions are one


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
