"""Low-bit attention on a GPU: one workspace for the quantised copies, then the launches.

Everything a call needs beside its output lies in one allocation: codes, scales, means and the
corrections of smoothing. Where each begins depends on shapes alone and is cached, so the host's part
of a call is one allocation, one launch a kernel and little else. Nothing here synchronises.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, get_format, scale_block
from lowbit_video.kernels.launch import recorded
from lowbit_video.kernels.quant.shapes import code_shape, partial_shape, scale_shape, v_code_shape
from lowbit_video.kernels.variants import KernelVariant, Request

from ..precision import Precision
from . import replay
from .options import AttentionOptions
from .packing import Packing

ALIGNMENT = 256
"""Bytes between the beginnings of the workspace's parts; TMA needs 16, whole cache lines are faster."""
INTERPRETED_ARCH = (9, 0)
"""What Triton's CPU interpreter plays: an arch that has every format."""
FP16_MAX = get_format("fp16").max_code


@dataclass(frozen=True)
class Workspace:
    """Where the parts of a call's workspace begin: parts[name] = (byte offset, dtype name, shape); bytes in all."""

    parts: dict[str, tuple[int, str, tuple[int, ...]]]
    size: int

    def buffers(self, address: int) -> dict[str, Buffer]:
        return {name: Buffer(address + offset, dtype) for name, (offset, dtype, _) in self.parts.items()}


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


@functools.lru_cache(maxsize=1024)
def plan_workspace(q_shape: tuple[int, int, int, int], kv_shape: tuple[int, int, int, int], precision: Precision, lse: bool,
                   varlen: bool = False, max_q: int | None = None, max_k: int | None = None) -> Workspace:
    """The workspace of low-bit attention over q [B, Hq, Nq, D] and k, v [B, Hkv, Nkv, D] (varlen: [S, H, T, D])."""
    batch, q_heads, q_len, head_dim = q_shape
    kv_heads, kv_len = kv_shape[1], kv_shape[2]
    rows = () if varlen else (batch,)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "q_codes": (get_format(precision.q).storage, code_shape(q_shape, precision.q, varlen)),
        "k_codes": (get_format(precision.k).storage, code_shape(kv_shape, precision.k, varlen)),
        "q_scale": ("float32", scale_shape(q_shape, None, varlen)),
        "k_scale": ("float32", scale_shape(kv_shape, scale_block("k", precision.granularity), varlen)),
    }
    scratch = 0
    if precision.pv == "fp8":
        wanted["v_codes"] = ("float8_e4m3fn", v_code_shape(kv_shape, varlen))
        wanted["v_scale"] = ("float32", (batch, kv_heads, head_dim))
        scratch += _elements(partial_shape(kv_shape, max_k))
    if precision.smooth_k:
        wanted["k_mean"] = ("float32", (batch, kv_heads, head_dim))
        scratch += _elements(partial_shape(kv_shape, max_k))
        if lse:
            wanted["lse_shift"] = ("float32", (*rows, q_heads, q_len))
    if precision.smooth_q:
        wanted["q_mean"] = ("float32", (batch, q_heads, head_dim))
        wanted["bias"] = ("float32", (*rows, q_heads, kv_len))
        scratch += _elements(partial_shape(q_shape, max_q))
    if scratch:
        wanted["partial"] = ("float32", (scratch,))
    parts, size = {}, 0
    sizes = {"float32": 4}
    for name, (dtype, shape) in wanted.items():
        parts[name] = (size, dtype, shape)
        size += -(-_elements(shape) * sizes.get(dtype, 1) // ALIGNMENT) * ALIGNMENT
    return Workspace(parts, max(size, ALIGNMENT))


class Call:
    """One attention call on a GPU: `quantise()` fills the workspace, `attend()` computes the output from it.

    The two are apart for benchmarks, which time the kernel without quantisation; `run()` does both. Each launch
    method must run inside `runtime.launch_guard(q)`, as `run()` does.

    q, k, v: [B, N, H, D] ("NHD") or [B, H, N, D] ("HND"); with `packing` [T, H, D]. options: with a number for a scale.
    config: how the attention kernel is built, in place of the tuning table's choice.
    """

    def __init__(self, variant: KernelVariant, options: AttentionOptions, q: Any, k: Any, v: Any, *, runtime: Any,
                 packing: Packing | None = None, config: Any = None) -> None:
        q, k, v = (_rows_contiguous(x, runtime) for x in (q, k, v))
        self.tensors = (q, k, v)  # keeps their memory, which the buffers only point at
        self.variant, self.options, self.runtime, self.packing, self.config = variant, options, runtime, packing, config
        self.arch = runtime.arch(q) or INTERPRETED_ARCH
        self.q_shape, self.q_strides = _geometry(q, runtime, options.tensor_layout, packing)
        self.kv_shape, self.k_strides = _geometry(k, runtime, options.tensor_layout, packing)
        self.v_strides = _geometry(v, runtime, options.tensor_layout, packing)[1]
        self.dtype = runtime.dtype_name(q)
        self.q, self.k, self.v = (Buffer(x.data_ptr(), self.dtype) for x in (q, k, v))
        shape = runtime.shape(q)
        self.out = runtime.empty(shape, self.dtype, q)
        self.out_strides = _geometry(self.out, runtime, options.tensor_layout, packing)[1]
        batch, q_heads, q_len, _ = self.q_shape
        rows = (q_heads, q_len) if packing else (batch, q_heads, q_len)
        self.lse = runtime.empty(rows, "float32", q) if options.return_lse else None
        self.workspace, self.buffers = None, {}
        if not options.precision.exact:
            varlen = dict(varlen=True, max_q=packing.max_q, max_k=packing.max_k) if packing else {}
            layout = plan_workspace(self.q_shape, self.kv_shape, options.precision, options.return_lse, **varlen)
            self.workspace = runtime.empty((layout.size,), "uint8", q)
            self.buffers = layout.buffers(self.workspace.data_ptr())

    def run(self) -> Any:
        """Launches everything; returns out, or (out, lse)."""
        with self.runtime.launch_guard(self.tensors[0]):
            self.quantise()
            self.attend()
        return self.out if self.lse is None else (self.out, self.lse)

    def quantise(self) -> None:
        """Launches the kernels that fill the workspace: statistics, then codes. Exact variants have none."""
        if self.options.precision.exact:
            return
        from lowbit_video.kernels.quant import quant_qk, quant_v, token_stats

        precision, part = self.options.precision, self.buffers.get
        q_varlen, k_varlen = {}, {}
        if self.packing is not None:
            q_varlen = dict(cu_seqlens=self.packing.cu_q, max_len=self.packing.max_q)
            k_varlen = dict(cu_seqlens=self.packing.cu_k, max_len=self.packing.max_k)
        group = self.q_shape[1] // self.kv_shape[1]
        k_mean, q_mean, v_scale = part("k_mean"), part("q_mean"), part("v_scale")
        wanted: dict[str, Any] = {}
        if precision.smooth_q:
            wanted.update(q=self.q, q_strides=self.q_strides, q_mean=q_mean, q_shape=self.q_shape)
        if precision.smooth_k:
            wanted.update(k=self.k, k_strides=self.k_strides, k_mean=k_mean)
        if precision.pv == "fp8":
            wanted.update(v=self.v, v_strides=self.v_strides, v_scale=v_scale)
        if wanted:
            token_stats.launch_stats(part("partial"), kv_shape=self.kv_shape, **wanted, **self._packing())
        if precision.pv == "fp8":  # first, and K next: the statistics' last reads are still in the L2 cache
            quant_v.launch_quant_v(self.v, self.v_strides, part("v_codes"), v_scale, shape=self.kv_shape, **k_varlen)
        quant_qk.launch_quant_qk(
            self.k, self.k_strides, part("k_codes"), part("k_scale"), shape=self.kv_shape, format=precision.k,
            block=scale_block("k", precision.granularity), mean=k_mean, bias=part("bias"), q_mean=q_mean,
            group=group, **k_varlen)
        shift = part("lse_shift")
        quant_qk.launch_quant_qk(
            self.q, self.q_strides, part("q_codes"), part("q_scale"), shape=self.q_shape, format=precision.q, block=None,
            mean=q_mean, lse_shift=shift, k_mean=None if shift is None else k_mean, sm_scale=self.options.scale,
            group=group, **q_varlen)

    def attend(self) -> None:
        """Launches the attention kernel on what `quantise` left."""
        precision, part = self.options.precision, self.buffers.get
        extra = self._packing()
        if precision.exact:
            exact_format = FORMAT_OF_DTYPE[self.dtype]
            formats = dict(q_format=exact_format, k_format=exact_format, pv_format="fp16")
            extra.update(q_strides=self.q_strides, k_strides=self.k_strides, v_strides=self.v_strides)
            q, k, v = self.q, self.k, self.v
        else:
            formats = dict(q_format=precision.q, k_format=precision.k, pv_format=precision.pv)
            q, k, v = part("q_codes"), part("k_codes"), part("v_codes")
            extra.update(granularity=precision.granularity, q_scale=part("q_scale"), k_scale=part("k_scale"), bias=part("bias"),
                         v_scale=part("v_scale"), lse_shift=part("lse_shift"))
            if v is None:
                v = self.v
                extra.update(v_strides=self.v_strides, pv_dtype=self._pv_dtype())
        if self.config is not None:
            extra["config"] = self.config
        self.variant.load()(
            q, k, v, Buffer(self.out.data_ptr(), self.dtype), q_shape=self.q_shape, kv_shape=self.kv_shape, **formats,
            out_strides=self.out_strides, lse=self.lse, sm_scale=self.options.scale, is_causal=self.options.is_causal,
            arch=self.arch, **extra)

    def _packing(self) -> dict[str, Any]:
        """What a launcher that takes Q and K is told of a variable-length batch."""
        if self.packing is None:
            return {}
        return dict(cu_seqlens_q=self.packing.cu_q, cu_seqlens_k=self.packing.cu_k, max_q=self.packing.max_q,
                    max_k=self.packing.max_k)

    def _pv_dtype(self) -> str | None:
        """The 16-bit type of P and V: V's own; for float32 bfloat16, whose range holds any V, unless V is on the CPU.

        How large V is on a GPU could only be learnt by waiting for it.
        """
        if self.dtype != "float32":
            return None
        v = self.tensors[2]
        if not self.runtime.is_cpu(v):
            return "bfloat16"
        return "float16" if float(abs(self.runtime.to_numpy(v)).max(initial=0.0)) <= FP16_MAX else "bfloat16"


def _rows_contiguous(x: Any, runtime: Any) -> Any:
    """x itself if its last dimension is contiguous, else a contiguous copy."""
    strides = runtime.strides(x)
    return x if strides[-1] == 1 or runtime.shape(x)[-1] == 1 else runtime.contiguous(x)


def _geometry(x: Any, runtime: Any, tensor_layout: str, packing: Packing | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape (B, H, N, D) and strides (batch, head, seq) in elements; packed: (S, H, T, D) and (0, head, seq)."""
    shape, strides = runtime.shape(x), runtime.strides(x)
    if packing is not None:
        tokens, heads, head_dim = shape
        return (packing.count(runtime), heads, tokens, head_dim), (0, strides[1], strides[0])
    if tensor_layout == "HND":
        return tuple(shape), tuple(strides[:3])
    batch, tokens, heads, head_dim = shape
    return (batch, heads, tokens, head_dim), (strides[0], strides[2], strides[1])


def attend(variant: KernelVariant, request: Request, tensors: tuple[Any, Any, Any], options: AttentionOptions,
           packing: Packing | None, runtime: Any, key: tuple | None = None) -> tuple[Any, Any]:
    """(out, lse or None) of checked tensors by a selected variant. options.scale: a number.

    key: of `replay.key_of`; what is launched is kept as its plan.
    """
    given = packing and packing.contiguous(runtime)
    call = Call(variant, options, *tensors, runtime=runtime, packing=given)
    with runtime.launch_guard(call.tensors[0]), recorded() as launches:
        call.quantise()
        call.attend()
    copied = given is not packing or any(used is not one for used, one in zip(call.tensors, tensors))
    if key is not None and not copied:
        tensors = tensors if packing is None else (*tensors, packing.cu_q, packing.cu_k)
        replay.keep(key, replay.make(launches, variant, runtime, tensors, call.out, call.lse, call.workspace))
    return call.out, call.lse


def run_quantize(x: Any, *, format: str, granularity: str, operand: str, smooth: bool, tensor_layout: str,
                 runtime: Any) -> dict[str, Any]:
    """Quantised copy of a GPU tensor: {"codes", "scale", "mean"} as tensors of its framework; mean is None unless smoothed.

    x: [B, N, H, D] or [B, H, N, D]. operand "q" or "k": codes [B, H, N, D / codes per byte], scale per row, or
    per 128 rows of k at granularity "block"; "v" (format "fp8"): codes
    [B, H, D, Npad], scale [B, H, D].
    """
    from lowbit_video.kernels.quant import quant_qk, quant_v, token_stats

    x = _rows_contiguous(x, runtime)
    shape, strides = _geometry(x, runtime, tensor_layout, None)
    channels = (shape[0], shape[1], shape[3])
    mean = runtime.empty(channels, "float32", x) if smooth else None
    partial = runtime.empty(partial_shape(shape), "float32", x) if smooth or operand == "v" else None
    if operand == "v":
        codes, scale = runtime.empty(v_code_shape(shape), "float8_e4m3fn", x), runtime.empty(channels, "float32", x)
        with runtime.launch_guard(x):
            token_stats.launch_stats(partial, v=x, v_strides=strides, v_scale=scale, kv_shape=shape)
            quant_v.launch_quant_v(x, strides, codes, scale, shape=shape)
        return dict(codes=codes, scale=scale, mean=None)
    block = scale_block(operand, granularity)
    codes = runtime.empty(code_shape(shape, format), get_format(format).storage, x)
    scale = runtime.empty(scale_shape(shape, block), "float32", x)
    with runtime.launch_guard(x):
        if smooth:
            token_stats.launch_stats(partial, k=x, k_strides=strides, k_mean=mean, kv_shape=shape)
        quant_qk.launch_quant_qk(x, strides, codes, scale, shape=shape, format=format, block=block, mean=mean)
    return dict(codes=codes, scale=scale, mean=mean)
