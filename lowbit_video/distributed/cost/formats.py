"""What attention's operands and its output are on the wire, in bytes: by the layouts that the wrappers send, scales counted."""
from __future__ import annotations

from dataclasses import dataclass

from lowbit_video.kernels.exchange.layout import Kind, Layout

from ...engine.codes import statistics_of
from ...engine.options import AttentionOptions
from ...engine.rows import rows_size
from ...precision import Precision
from ..exchange import check_exchange, on_the_wire

ITEM = 2
"""Bytes of a value that travels as it is."""


@dataclass(frozen=True)
class WireFormat:
    """What travels.

    precision: of attention, with K in the format that the exchange names. kind: of the codes; None where values travel in 16
    bits. statistics: float32 vectors a head that ranks tell each other before they quantise. output: of exchange.OUTPUTS.
    """

    precision: Precision
    head_dim: int
    kind: Kind | None
    statistics: int
    output: str

    def __str__(self) -> str:
        return "16 bit" if self.kind is None else f"codes of {self.precision}"

    def operand_bytes(self, batch: int, heads: int, rows: int) -> int:
        """Q, K and V of heads [batch, rows, head_dim], as Ulysses sends them."""
        if self.kind is None:
            return 3 * ITEM * batch * heads * rows * self.head_dim
        return heads * Layout(self.kind, batch, 1, rows, rows).size

    def ring_bytes(self, batch: int, heads: int, rows: int) -> int:
        """K and V of heads, as a ring passes them on."""
        if self.kind is None:
            return 2 * ITEM * batch * heads * rows * self.head_dim
        return Layout(self.kind, batch, heads, 0, rows).size

    def output_bytes(self, batch: int, heads: int, rows: int) -> int:
        """Rows of the output for one rank. Values that came in 16 bits go back so."""
        if self.output == "int8" and self.kind is not None:
            return rows_size(rows, batch, heads, self.head_dim)
        return ITEM * batch * heads * rows * self.head_dim


def wire_format(precision: str, head_dim: int, exchange: str = "auto", output: str = "16bit") -> WireFormat:
    """The format of a precision's exchange. Raises ValueError for one that does not exist, listing those that do."""
    check_exchange(exchange, output)
    options = on_the_wire(AttentionOptions(precision), exchange)
    own = options.precision
    if own.exact or exchange == "16bit":
        return WireFormat(own, head_dim, None, 0, output)
    kind = Kind(head_dim, own.q, own.k, own.pv, own.granularity, "float16", bias=own.smooth_q)
    return WireFormat(own, head_dim, kind, sum(statistics_of(options)), output)
