"""What a frame may take the place of: a library's own processor is replaced only where the frame computes the same."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import UnsupportedError
from .cogvideox import joint_attention
from .one_stream import one_stream_attention
from .two_streams import two_stream_attention
from .wan import wan_attention

ALIKE: dict[Callable, tuple[str, ...]] = {
    joint_attention: ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    one_stream_attention: ("AttnProcessor", "AttnProcessor2_5", "SlicedAttnProcessor", "XFormersAttnProcessor"),
    two_stream_attention: ("FusedJointAttnProcessor2_5", "HunyuanVideoAttnProcessor2_0", "JointAttnProcessor2_5"),
    wan_attention: ("WanAttnProcessor2_0",),
}
"""ppdiffusers' processors that compute what a frame does."""


def check_replaced(frame: Callable, processor: Any) -> None:
    """Raises UnsupportedError for a processor that does something which the frame would leave out.

    processor: what the module has. One that is neither ppdiffusers' nor has weights is its owner's concern.
    """
    name, leave = type(processor).__name__, "or leave the module alone (modules={its name: None})"
    if hasattr(processor, "state_dict"):
        raise UnsupportedError(f"its processor, {name}, has weights, which would not count while another one is in its place; "
                               f"take it off first (an IP adapter, a LoRA), {leave}")
    alike = ALIKE.get(frame, ())
    if type(processor).__module__.startswith("ppdiffusers.") and name not in alike:
        raise UnsupportedError(f"its processor, {name}, is none of those that {frame.__name__} computes the same as "
                               f"({', '.join(alike)}); set one of these first, {leave}")
