"""How many bytes attention's operands and its output are on the wire, scales counted."""
from __future__ import annotations

from dataclasses import dataclass

from lowbit_video.kernels.formats import BLOCK_K

from ...precision import Precision

EXCHANGES = ("16bit", "int8", "int4")
"""What Q, K and V travel as: int8 is Q and K, int4 is K alone (Q stays int8); V goes by P.V, FP8 or 16 bit."""
OUTPUTS = ("16bit", "int8")
"""What attention's output travels as; int8 has a scale a row."""
SCALE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class WireFormat:
    """What travels.

    exchange: of EXCHANGES. output: of OUTPUTS. pv: the precision's, "fp8" or "fp16".
    Raises ValueError for others.
    """

    exchange: str
    output: str
    pv: str

    def __post_init__(self) -> None:
        for kind, value, known in (("exchange", self.exchange, EXCHANGES), ("output", self.output, OUTPUTS)):
            if value not in known:
                raise ValueError(f"unknown {kind} {value!r}; there are: {', '.join(known)}")

    @property
    def coded(self) -> bool:
        """Whether Q, K and V are quantised before they travel."""
        return self.exchange != "16bit"

    def query_bytes(self, rows: int, head_dim: int) -> int:
        """Q of a head: [rows, head_dim]; int8 with a scale a row."""
        return rows * (head_dim + SCALE) if self.coded else rows * head_dim * 2

    def key_bytes(self, rows: int, head_dim: int) -> int:
        """K of a head: int8 with a scale a block of 128 rows, int4 with a scale a row."""
        if self.exchange == "int8":
            return rows * head_dim + -(-rows // BLOCK_K) * SCALE
        return rows * (head_dim // 2 + SCALE) if self.exchange == "int4" else rows * head_dim * 2

    def value_bytes(self, rows: int, head_dim: int) -> int:
        """V of a head: FP8, whose channel scales all ranks know, or 16 bit."""
        return rows * head_dim * (1 if self.coded and self.pv == "fp8" else 2)

    def operand_bytes(self, rows: int, head_dim: int) -> int:
        """Q, K and V of a head."""
        return sum(part(rows, head_dim) for part in (self.query_bytes, self.key_bytes, self.value_bytes))

    def ring_bytes(self, rows: int, head_dim: int) -> int:
        """K and V of a head that go round the ring; FP8's channel scales are each part's own and go along."""
        scales = head_dim * SCALE if self.coded and self.pv == "fp8" else 0
        return self.key_bytes(rows, head_dim) + self.value_bytes(rows, head_dim) + scales

    def output_bytes(self, rows: int, head_dim: int) -> int:
        """The output of a head."""
        return rows * (head_dim + SCALE) if self.output == "int8" else rows * head_dim * 2


def wire_format(precision: Precision, exchange: str = "auto", output: str = "16bit") -> WireFormat:
    """The format for a precision; "auto" sends the codes that its kernel takes, or 16 bit where these do not travel.

    Raises ValueError where the codes are not the kernel's.
    """
    own = {("int8", "int8"): "int8", ("int8", "int4"): "int4"}.get((precision.q, precision.k), "16bit")
    if exchange == "auto":
        exchange = own
    if exchange in EXCHANGES[1:] and exchange != own:
        raise ValueError(f"--exchange {exchange} sends codes that {precision} does not compute with; it can have: "
                         + ", ".join(dict.fromkeys(("16bit", own))))
    return WireFormat(exchange, output, precision.pv)
