"""What the backends are called: `lowbit_int8_fp8` for "int8+fp8", and `lowbit_int8_fp8_strict` where nothing may fall back."""
from __future__ import annotations

from ...precision import EXACT_SPECS, precision_specs

PREFIX, STRICT = "lowbit_", "_strict"
RECIPE = PREFIX + "recipe"
"""The backend that asks for each call which recipe its module has; `apply(model, recipe)` sets it."""


def backend_names() -> dict[str, tuple[str, str | None]]:
    """(precision, fallback) by the backend's name; the fallback is that of `LowBitAttnProcessor`."""
    names = {PREFIX + spec.replace("/", "_").replace("+", "_"): spec for spec in precision_specs() if spec not in EXACT_SPECS}
    return {**{name: (spec, "exact") for name, spec in names.items()},
            **{name + STRICT: (spec, None) for name, spec in names.items()}}
