"""The noise floor: exact attention that differs from the usual one only where rounding falls.

Keys and values are read from last to first, the queries in two halves, and the samples of a batch (the two halves of
classifier-free guidance) one after the other. On paper nothing changes; what changes in the video is the noise that any
exact implementation has against any other, and no low-bit figure can be read below it.
"""
from __future__ import annotations

from typing import Any

from lowbit_video.hook.attend import exact_attend
from lowbit_video.hook.processors import ExactAttnProcessor
from lowbit_video.runtime.detect import runtime_of


class ReorderedExactProcessor(ExactAttnProcessor):
    """Exact attention in another order and another batch split."""

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any = None,
                 image_rotary_emb: Any = None) -> tuple[Any, Any]:
        """As `AttnProcessor.__call__`, one sample at a time."""
        batch = hidden_states.shape[0]
        if batch == 1 or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        runtime = runtime_of(hidden_states)
        one = super().__call__
        samples = [one(attn, hidden_states[i : i + 1], encoder_hidden_states[i : i + 1], None, image_rotary_emb)
                   for i in range(batch)]
        video, text = zip(*samples)
        return runtime.concat(list(video), 0), runtime.concat(list(text), 0)

    def attend(self, q: Any, k: Any, v: Any, is_causal: bool = False, scale: float | None = None,
               return_lse: bool = False) -> Any:
        """Exact attention of [B, N, H, D] with keys from last to first and queries in two halves."""
        if is_causal or return_lse:
            return super().attend(q, k, v, is_causal, scale, return_lse)
        self.note("exact (reordered)")
        k, v = k.flip([1]), v.flip([1])
        half = (q.shape[1] + 1) // 2
        parts = [exact_attend(part, k, v, scale=scale) for part in (q[:, :half], q[:, half:]) if part.shape[1]]
        return runtime_of(q).concat(parts, 1)
