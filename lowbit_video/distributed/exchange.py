"""What travels: the choices of an exchange, and the precision whose codes go on the wire."""
from __future__ import annotations

from dataclasses import replace

from ..engine.options import AttentionOptions
from ..precision import Precision, precision_specs

EXCHANGES = ("auto", "16bit", "int8", "int4")
"""How Q, K and V travel: "16bit" as they are; "int8", "int4" as the codes that the kernel takes, with K in that format; "auto"
as codes of the attention's own precision. Exact attention has no codes: its values travel as they are."""
OUTPUTS = ("16bit", "int8")
"""How attention's output travels back: as it is, or as INT8 with a scale a row."""


def check_exchange(exchange: str, output: str) -> None:
    """Raises ValueError for what does not exist, listing what does."""
    for name, given, known in (("exchange", exchange, EXCHANGES), ("output", output, OUTPUTS)):
        if given not in known:
            raise ValueError(f"unknown {name} {given!r}; there are: {', '.join(known)}")


def on_the_wire(options: AttentionOptions, exchange: str) -> AttentionOptions:
    """The options with K in the format that the exchange names. Raises ValueError where no precision has it."""
    precision = options.precision
    if exchange in ("auto", "16bit") or precision.exact or precision.k == exchange:
        return options
    spec = f"{precision.q if precision.q == exchange else f'{precision.q}/{exchange}'}+{precision.pv}"
    if spec not in precision_specs():
        raise ValueError(f"exchange {exchange!r} would make {precision} attention {spec!r}, which does not exist; there are: "
                         f"{', '.join(precision_specs())}; try exchange='auto'")
    return replace(options, precision=Precision(spec, smooth_k=precision.smooth_k, smooth_q=precision.smooth_q,
                                                rotate=precision.rotate))
