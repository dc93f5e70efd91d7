"""`VARIANTS`: the single declaration of what exists. Selection, tests, benchmarks and tables read it.

A Precision is one point a caller asks for; a KernelVariant covers a set of them. `why_not(request)`
answers with a reason or None, and backend="auto" takes the first variant that has none, in table order.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .formats import EXACT_FORMATS, FORMATS, ROTATED
from .pooled.tiles import POOLED_FROM

Arch = tuple[int, int]
"""Compute capability, (9, 0) for sm_90."""


@dataclass(frozen=True)
class Request:
    """One attention call as selection sees it.

    device: "cpu" or "cuda". arch: compute capability, None on a CPU. q, k, pv: format names.
    dtype: of the tensors ("float16", "bfloat16", "float32"). only_if_faster: also refuse where exact
    attention is measured to be faster. interpret: Triton's CPU interpreter is on. v_aligned: V begins at, and its
    dimensions step by, multiples of 16 bytes, as a kernel that reads V itself by TMA needs; qk_aligned: so do Q and K. pooled:
    some keys are pooled. negative: the scale is.
    """

    device: str
    arch: Arch | None
    q: str
    k: str
    pv: str
    granularity: str
    dtype: str
    head_dim: int
    q_len: int
    kv_len: int
    heads: int = 1
    kv_heads: int = 1
    smooth_q: bool = False
    causal: bool = False
    lse: bool = False
    varlen: bool = False
    only_if_faster: bool = False
    interpret: bool = False
    v_aligned: bool = True
    rotate: bool = False
    pooled: bool = False
    qk_aligned: bool = True
    negative: bool = False

    def __str__(self) -> str:
        where = f"sm_{self.arch[0]}{self.arch[1]}" if self.arch else self.device
        what = spec_of(self.q, self.k, self.pv) + " rotate" * self.rotate + ", pooled" * self.pooled
        return (f"{what} ({self.dtype}, head_dim {self.head_dim}, {self.q_len}x{self.kv_len} tokens) "
                f"on {where}")


@dataclass(frozen=True)
class KernelVariant:
    """One kernel and the requests it serves.

    qk: pairs of Q and K format. pv: formats of P.V. min_arch, max_arch: inclusive compute capabilities, None
    for a CPU kernel. head_dims: those served natively; padded: whether any multiple of 8 from 32 to the largest
    is served by padding. launcher: "module:function" from this folder on, imported when used. needs: names in NEEDS.
    interpreted: whether Triton's CPU interpreter runs it too. automatic: whether backend="auto" may take it; one that may not
    waits for its measurement, and runs where its backend is asked for. note: a word for the tables.
    """

    name: str
    backend: str
    qk: tuple[tuple[str, str], ...]
    pv: tuple[str, ...]
    launcher: str
    min_arch: Arch | None = None
    max_arch: Arch | None = None
    head_dims: tuple[int, ...] = (64, 128, 256)
    padded: bool = True
    granularities: tuple[str, ...] = ("block", "token")
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    features: frozenset[str] = field(default_factory=lambda: frozenset({"causal", "lse", "gqa", "varlen", "smooth_q"}))
    needs: tuple[str, ...] = ()
    interpreted: bool = False
    automatic: bool = True
    note: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.min_arch is None else "cuda"

    @property
    def specs(self) -> tuple[str, ...]:
        """The precision strings it serves."""
        return tuple(spec_of(*formats) for formats in self.formats)

    @property
    def formats(self) -> tuple[tuple[str, str, str], ...]:
        """The formats of Q, K and P.V that it serves, in the order of `specs`."""
        return tuple((q, k, pv) for q, k in self.qk for pv in self.pv if q not in EXACT_FORMATS or pv == q)

    def load(self) -> Callable:
        """The launcher."""
        module, _, function = self.launcher.partition(":")
        return getattr(importlib.import_module(module, __package__), function)

    def why_not(self, request: Request) -> str | None:
        """Why this kernel cannot serve the request, or None if it can."""
        if (request.q, request.k) not in self.qk:
            return f"Q.K in {request.q}/{request.k} is not among its formats ({_pairs(self.qk)})"
        if request.pv not in self.pv:
            return f"P.V in {request.pv} is not among its formats ({', '.join(self.pv)})"
        reason = self._why_not_here(request)
        if reason:
            return reason
        if request.granularity not in self.granularities:
            return f"scales per {request.granularity} are not supported (it has: per {', '.join(self.granularities)})"
        if request.dtype not in self.dtypes:
            return f"dtype {request.dtype} is not supported (it takes {', '.join(self.dtypes)})"
        if self.padded:
            if not (32 <= request.head_dim <= max(self.head_dims) and request.head_dim % 8 == 0):
                return f"head_dim {request.head_dim} is not a multiple of 8 from 32 to {max(self.head_dims)}"
        elif request.head_dim not in self.head_dims:
            return f"head_dim {request.head_dim} is not supported (it has {', '.join(map(str, self.head_dims))})"
        used = {"causal": request.causal, "lse": request.lse, "varlen": request.varlen, "smooth_q": request.smooth_q,
                "gqa": request.heads != request.kv_heads}
        exact = request.q in EXACT_FORMATS
        if exact and self.device == "cuda" and request.dtype != FORMATS[request.q].storage:
            return (f"exact attention in {request.q} takes {FORMATS[request.q].storage} tensors, not {request.dtype} "
                    "(try 'exact')")
        missing = [name for name, wanted in used.items() if wanted and name not in self.features]
        if missing:
            return f"it does not support {', '.join(missing)}"
        if request.rotate and request.head_dim not in ROTATED:
            return f"rotation needs a head dim of {' or '.join(map(str, ROTATED))}, not {request.head_dim}"
        if request.rotate and self.min_arch is not None and (reason := _compiled(request)):
            return f"rotation: {reason}"
        if request.pooled and (reason := _why_not_pooled(request)):
            return reason
        for need in self.needs:
            if reason := NEEDS[need](request):
                return reason
        if request.only_if_faster and request.arch is not None and not exact:
            from .tuning import faster_from, slow_rows

            if slow := slow_rows(request.k, request.arch, request.head_dim):
                return f"exact attention is faster at head dim {request.head_dim}, where {slow}"
            shortest = faster_from(self.name, request.pv, request.arch, request.head_dim)
            if request.kv_len < shortest:
                return f"exact attention is faster below {shortest} tokens ({request.kv_len} given)"
        return None

    def _why_not_here(self, request: Request) -> str | None:
        if self.min_arch is None:
            return None if request.device == "cpu" else "it runs on CPU tensors only"
        if request.interpret and self.interpreted:
            return None
        if request.device != "cuda":
            return "it needs an NVIDIA GPU"
        if request.arch < self.min_arch or (self.max_arch and request.arch > self.max_arch):
            wanted = _sm(self.min_arch) + ("" if self.max_arch == self.min_arch else " or later")
            return f"it needs {wanted}; this GPU is {_sm(request.arch)}"
        return None


def _why_not_pooled(request: Request) -> str | None:
    if request.q in EXACT_FORMATS:
        return "keys are pooled beside low-bit ones only, not beside exact ones"
    together = [name for name, wanted in (("is_causal", request.causal), ("packed sequences", request.varlen),
                                              ("rotation", request.rotate)) if wanted]
    if together:
        return f"pooled keys are not supported with {' or '.join(together)}"
    if request.only_if_faster and request.kv_len < POOLED_FROM:
        return f"choosing what to pool costs more than it saves below {POOLED_FROM} tokens ({request.kv_len} given)"
    return None


def _hopper_code(request: Request) -> str | None:
    from .attention.gluon_shim import why_not_gluon
    from .shipped.choice import chosen, why_not_shipped

    who = chosen()
    if who.shipped and not request.pooled:  # of which none is shipped
        smoothed_lse = request.lse and request.q not in EXACT_FORMATS
        reason = why_not_shipped(arch=request.arch, lse=smoothed_lse, group=request.heads // max(request.kv_heads, 1))
        if reason is None or not who.compiled:
            return reason and f"{reason}, and nothing is compiled: {who.why}"
    return why_not_gluon() if who.compiled else f"nothing is compiled: {who.why}"


def _compiled(request: Request) -> str | None:
    from .shipped.choice import chosen

    who = chosen()
    return None if request.interpret or who.compiled else f"it is not shipped compiled, and nothing is compiled: {who.why}"


def _v_by_tma(request: Request) -> str | None:
    if request.pv == "fp16" and not request.v_aligned:
        return "V's address or strides are not multiples of 16 bytes (a contiguous copy's are)"
    return None


def _all_by_tma(request: Request) -> str | None:
    if not (request.qk_aligned and request.v_aligned):
        return "an address or a stride of Q, K or V is no multiple of 16 bytes (a contiguous copy's are)"
    return None


def _no_negative_scale(request: Request) -> str | None:
    return "the scale is negative, and it takes row maxima before it multiplies by it" if request.negative else None


NEEDS: dict[str, Callable[[Request], str | None]] = {"gluon": _hopper_code, "triton": _compiled, "v by tma": _v_by_tma,
                                                          "all by tma": _all_by_tma, "a scale": _no_negative_scale}
"""What a kernel may need beside formats, sizes and a GPU: each says why a request does not meet it, or None."""


def spec_of(q: str, k: str, pv: str) -> str:
    """The precision's string of these formats."""
    return pv if q in EXACT_FORMATS else f"{_pairs(((q, k),))}+{pv}"


def _sm(arch: Arch) -> str:
    return f"sm_{arch[0]}{arch[1]}"


def _pairs(qk: Iterable[tuple[str, str]]) -> str:
    return ", ".join(q if q == k else f"{q}/{k}" for q, k in qk)


_INTEGER_QK = (("int8", "int8"), ("int8", "int4"), ("int8", "int2"), ("int4", "int4"), ("int2", "int2"))
_FP8_QK = (("fp8", "fp8"),)
_EXACT_QK = tuple((name, name) for name in EXACT_FORMATS)

VARIANTS: tuple[KernelVariant, ...] = (
    KernelVariant(
        "hopper-int8", "hopper", (("int8", "int8"),), ("fp16", "fp8"), ".attention.hopper.launch:launch_attn_fwd",
        min_arch=(9, 0), max_arch=(9, 0), head_dims=(64, 128), padded=False, granularities=("block",),
        dtypes=("float16", "bfloat16"), features=frozenset({"causal", "lse", "gqa"}), needs=("gluon", "v by tma"),
        note="Gluon: TMA, warp specialisation"),
    KernelVariant(
        "hopper-fp8", "hopper", _FP8_QK, ("fp8",), ".attention.hopper.launch:launch_attn_fwd",
        min_arch=(9, 0), max_arch=(9, 0), head_dims=(64, 128), padded=False, granularities=("block",),
        dtypes=("float16", "bfloat16"), features=frozenset({"causal", "lse", "gqa"}), needs=("gluon", "v by tma"),
        note="Gluon: TMA, warp specialisation"),
    KernelVariant(
        "triton-int-fp16", "triton", _INTEGER_QK, ("fp16",), ".attention.portable:launch_attn_fwd",
        min_arch=(8, 0), needs=("triton",), interpreted=True),
    KernelVariant(
        "triton-int-fp8", "triton", _INTEGER_QK, ("fp8",), ".attention.portable:launch_attn_fwd",
        min_arch=(8, 9), needs=("triton",), interpreted=True),
    KernelVariant(
        "triton-fp8", "triton", _FP8_QK, ("fp16", "fp8"), ".attention.portable:launch_attn_fwd",
        min_arch=(8, 9), needs=("triton",), interpreted=True),
    KernelVariant(
        "hopper-exact", "hopper", (("fp16", "fp16"), ("bf16", "bf16")), ("fp16", "bf16"),
        ".attention.hopper.launch:launch_attn_fwd", min_arch=(9, 0), max_arch=(9, 0), head_dims=(64, 128), padded=False,
        dtypes=("float16", "bfloat16"), features=frozenset({"causal", "lse", "gqa"}), needs=("gluon", "all by tma", "a scale"),
        note="Gluon: TMA, warp specialisation"),
    KernelVariant(
        "triton-exact", "triton", _EXACT_QK, EXACT_FORMATS,
        ".attention.portable:launch_attn_fwd", min_arch=(8, 0), needs=("triton",), interpreted=True,
        note="full precision, the same kernel"),
    KernelVariant(
        "reference-lowbit", "reference", _INTEGER_QK + _FP8_QK, ("fp16", "fp8"),
        ".attention.reference:lowbit_attention", note="NumPy, the oracle of the others"),
    KernelVariant(
        "reference-exact", "reference", _EXACT_QK, EXACT_FORMATS,
        ".attention.reference:lowbit_attention", note="NumPy, float32"),
)
"""Every kernel there is, the preferred one first."""

BACKENDS = ("auto",) + tuple(dict.fromkeys(v.backend for v in VARIANTS))
"""What `backend=` takes."""
