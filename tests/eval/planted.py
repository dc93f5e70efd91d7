"""Processors with a known defect: what an evaluation must catch."""
import numpy as np

from lowbit_video import ExactAttnProcessor
from lowbit_video.runtime.detect import runtime_of


class Planted(ExactAttnProcessor):
    def attend(self, q, k, v, is_causal=False, scale=None, return_lse=False):
        out = super().attend(q, k, v, is_causal, scale, return_lse)
        runtime = runtime_of(out)
        return runtime.from_numpy(self.spoil(runtime.to_numpy(out).copy()), out, "float32")


class Noise(Planted):
    """Adds noise of 2 % of the output's root mean square."""

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(0)

    def spoil(self, out):
        return out + 0.02 * np.sqrt(np.square(out).mean()) * self.random.standard_normal(out.shape).astype(np.float32)


class SwapHeads(Planted):
    """Exchanges the first two heads."""

    def spoil(self, out):
        out[:, :, [0, 1]] = out[:, :, [1, 0]]
        return out


class ZeroTail(Planted):
    """Zeroes the last block of queries: what an unmasked tail does."""

    def spoil(self, out):
        out[:, -(out.shape[1] % 64 or 64):] = 0
        return out


class NotANumber(Planted):
    """Gives NaN."""

    def spoil(self, out):
        return out * np.float32(np.nan)


def only_in_layer_1(defect=SwapHeads):
    """A defect, exchanged heads unless another is named, in one layer only: for the layer table to find."""
    return {"transformer_blocks.1.*": defect()}
