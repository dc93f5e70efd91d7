"""How the Hopper kernel is built: what was found best for each head dim and each format, and every choice of one launch."""
from __future__ import annotations

from dataclasses import dataclass

from ...formats import EXACT_FORMATS


@dataclass(frozen=True)
class HopperConfig:
    """How the kernel is built for one head dim and one V format, or for one head dim and Q, K and V in 16 bits.

    block_n: keys of a tile. consumers: warpgroups of 64 query rows. stages: K/V tiles in shared memory. registers: of a
    consumer's thread. sum_mma: row sums by an all-ones product instead of adds. turns: consumers take turns in the
    exponentials. pin: waits stay behind a quarter of the exponentials. hold: behind so many eighths of them, packed, and a
    consumer waits for its turn with the row maximum in hand. line (FP8, with hold and sum_mma): so many eighths of P without
    an exponential, as codes of e4m3 are nearly logarithms. lazy (16 bits): a row's maximum, and with it what was summed,
    stays until it is short by 2**8.
    """

    block_n: int
    consumers: int
    stages: int
    registers: int
    sum_mma: bool = True
    turns: bool = False
    pin: bool = False
    hold: int = 0
    line: int = 0
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.line and not (self.hold and self.sum_mma):
            raise ValueError(f"line={self.line} needs hold and sum_mma, given hold={self.hold}, sum_mma={self.sum_mma}")


# (head dim, P.V in FP8) -> how to build, whatever Q and K are in. eval/speed/NOTES.md has what else was tried.
CONFIGS = {
    (64, True): HopperConfig(128, 3, 3, 160, turns=True, hold=4, line=3),
    (128, True): HopperConfig(128, 2, 3, 240, pin=True),
    (64, False): HopperConfig(128, 3, 3, 160, sum_mma=False, lazy=True),
    (128, False): HopperConfig(128, 2, 3, 240, sum_mma=False),
}


# head dim -> how to build where Q, K and V are all in 16 bits. eval/speed/experiments/exact_hopper.json has the others' times.
EXACT_CONFIGS = {
    64: HopperConfig(128, 3, 3, 160, sum_mma=False, lazy=True),
    128: HopperConfig(64, 3, 5, 160, sum_mma=False, lazy=True),
}


def config_of(head_dim: int, q: str, pv: str) -> HopperConfig:
    """How the kernel is built by default for Q in one format and P.V in another, by name."""
    return EXACT_CONFIGS[head_dim] if q in EXACT_FORMATS else CONFIGS[head_dim, pv == "fp8"]


@dataclass(frozen=True, kw_only=True)
class Build(HopperConfig):
    """Every compile-time choice of a launch as one constant, which the kernel's functions hand on and read as `build.block_n`.

    It holds values and computes none: Triton finds compiled kernels by these values, and would not see code here change.
    head_dim: 64 or 128. causal: key j is visible to query i if j <= i + kv_len - q_len. lse, lse_shift: there is one to
    write, and one to add to it.
    """

    head_dim: int
    causal: bool
    lse: bool
    lse_shift: bool
