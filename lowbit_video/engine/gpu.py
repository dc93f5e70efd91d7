"""Low-bit attention on a GPU: the call's operands, one workspace for the quantised copies, then the launches.

The host's part of a call is one allocation beside the output's, one launch a kernel and little else. Nothing here synchronises.
"""
from __future__ import annotations

import functools
from typing import Any

from lowbit_video.kernels.buffers import Buffer, Origin, as_buffer
from lowbit_video.kernels.formats import FORMAT_OF_DTYPE, get_format, scale_block
from lowbit_video.kernels.launch import recorded
from lowbit_video.kernels.operands import Listed, Operand, codes_of, v_codes_of
from lowbit_video.kernels.pooled.tiles import query_tile
from lowbit_video.kernels.prologue.steps import Steps
from lowbit_video.kernels.quant.shapes import ceil_div, code_shape, partial_shape, scale_shape, v_code_shape
from lowbit_video.kernels.variants import KernelVariant, Request

from ..runtime.protocol import Runtime
from . import prologue, replay
from .half import fits_float16
from .options import AttentionOptions
from .packing import Packing
from .workspace import layout_workspace

INTERPRETED_ARCH = (9, 0)
"""What Triton's CPU interpreter plays: an arch that has every format."""


class Call:
    """One attention call on a GPU: `quantise()` fills the workspace, `attend()` computes the output from it.

    The two are apart for benchmarks, which time the kernel without quantisation; `run()` does both. Each launch
    method must run inside `runtime.launch_guard(q)`, as `run()` does.

    q, k, v: [B, N, H, D] ("NHD") or [B, H, N, D] ("HND"); with `packing` [T, H, D]. options: with a number for a scale.
    config: how the attention kernel is built, in place of the tuning table's choice. steps: of tensors, what is done to q and k
    on the way (`engine.prologue`).
    """

    def __init__(self, variant: KernelVariant, options: AttentionOptions, q: Any, k: Any, v: Any, *, runtime: Runtime,
                 packing: Packing | None = None, config: Any = None, steps: Steps | None = None) -> None:
        self.tensors = q, k, v = tuple(_rows_contiguous(x, runtime) for x in (q, k, v))  # kept: the buffers only point at them
        self.variant, self.options, self.runtime, self.config = variant, options, runtime, config
        self.arch = runtime.arch(q) or INTERPRETED_ARCH
        self.packed, self.given = None if packing is None else packing.operands(), steps
        operand = lambda x, name: _operand(x, name, runtime, options.tensor_layout, packing)
        self.steps = steps and prologue.with_buffers(steps, runtime, operand)
        self.q, self.k, self.v = operand(q, "q"), operand(k, "k"), operand(v, "v")
        self.out = runtime.empty(prologue.with_rest(runtime.shape(q), steps, options.tensor_layout, runtime),
                                 self.q.buffer.dtype, q)
        self.out_operand = operand(self.out, "out")
        if steps is not None and steps.rest is not None:  # strides are those of the first piece
            self.q, self.k, self.v = (x._replace(shape=self.out_operand.shape) for x in (self.q, self.k, self.v))
        batch, heads, tokens, _ = self.q.shape
        rows = (batch, heads, tokens) if packing is None else (heads, tokens)
        self.lse = runtime.empty(rows, "float32", q) if options.return_lse else None
        self.workspace, self.parts = None, {}
        if not options.precision.exact:
            lengths = (None, None) if packing is None else (packing.max_q, packing.max_k)
            layout = layout_workspace(self.q.shape, self.k.shape, options.precision, options.return_lse, packing is not None,
                                      *lengths, str(self.q.buffer.dtype) if options.pools else None, steps is not None)
            self.workspace = runtime.empty((layout.size,), "uint8", q)
            self.parts = layout.buffers(self.workspace.data_ptr())
            self.q_codes, self.k_codes, self.v_codes = self._codes()

    def run(self) -> Any:
        """Launches everything; returns out, or (out, lse)."""
        with self.runtime.launch_guard(self.tensors[0]):
            self.quantise()
            self.choose()
            self.attend()
        return self.out if self.lse is None else (self.out, self.lse)

    def quantise(self) -> None:
        """Launches the kernels that fill the workspace: statistics, then codes. Exact variants have none."""
        if self.options.precision.exact:
            return
        if self.steps is not None:
            self._prepare()
            return
        from lowbit_video.kernels.quant import channel_tops, quant_qk, quant_rotated, quant_v, token_stats

        precision, part, packed = self.options.precision, self.parts.get, self.packed
        group = self.q.shape[1] // self.k.shape[1]
        k_mean, q_mean, shift = part("k_mean"), part("q_mean"), part("lse_shift")
        wanted: dict[str, Any] = {}
        quant_q = quant_k = quant_qk.launch_quant_qk
        if precision.smooth_q:
            wanted.update(q=self.q, q_mean=q_mean)
        if self.options.pools:
            self._key_tiles()
        elif precision.smooth_k:
            wanted.update(k=self.k, k_mean=k_mean)
        if precision.pv == "fp8" and not self.options.pools:
            wanted.update(v=self.v, v_scale=self.v_codes.scale)
        if precision.rotate:
            tops = quant_rotated.Tops(part("q_top"), part("k_top"))
            wanted.update(q=self.q, k=self.k, q_top=tops.q, k_top=tops.k)
            channel_tops.launch_channel_tops(part("ranges"), **wanted, packed=packed)
            quant_q, quant_k = (functools.partial(quant_rotated.launch_quant_rotated, tops=tops, of=of) for of in "qk")
        elif wanted:
            token_stats.launch_stats(part("partial"), **wanted, packed=packed)
        if precision.pv == "fp8":  # first, and K next: the statistics' last reads are still in the L2 cache
            quant_v.launch_quant_v(self.v, self.v_codes, packed and packed.k)
        quant_k(self.k, self.k_codes, packed and packed.k, mean=k_mean, bias=part("bias"), q_mean=q_mean, group=group)
        quant_q(self.q, self.q_codes, packed and packed.q, mean=q_mean, lse_shift=shift,
                k_mean=None if shift is None else k_mean, sm_scale=self.options.scale, group=group)

    def _prepare(self) -> None:
        """Launches what norms, turns and quantises q and k in two readings."""
        from lowbit_video.kernels.prologue import quant, stats
        from lowbit_video.kernels.prologue.values import launch_prologue_values
        from lowbit_video.kernels.quant.quant_v import launch_quant_v

        part, fp8 = self.parts.get, self.options.precision.pv == "fp8"
        means = dict(q_mean=part("q_mean"), k_mean=part("k_mean"))
        if part("partial") is not None:
            stats.launch_prologue_stats(self.q, self.k, self.v, self.steps, part("partial"), **means, v_scale=part("v_scale"))
        if self.steps.rest is not None:
            launch_prologue_values(self.v, self.v_codes, self.steps)
        elif fp8:
            launch_quant_v(self.v, self.v_codes)
        quant.launch_prologue_quant(self.q, self.k, self.q_codes, self.k_codes, self.steps, **means,
                                    lse_shift=part("lse_shift"), score_bias=part("bias"), sm_scale=self.options.scale)

    def _key_tiles(self) -> None:
        """Launches the statistics of K and V, tile by tile and over all tokens."""
        from lowbit_video.kernels.pooled.tile_stats import launch_key_tiles

        part = self.parts.get
        launch_key_tiles(self.k, self.v, means=part("key_means"), keys=part("pooled_keys"), k_var=part("key_spreads"),
                         values=part("pooled_values"), v_spread=part("value_spreads"), k_mean=part("k_mean"),
                         v_absmax=part("value_absmax"), v_scale=part("v_scale"))

    def choose(self) -> None:
        """Launches what lists the key tiles to keep, and attention over the pooled others into the output; after `quantise`."""
        if not self.options.pools:
            return
        from lowbit_video.kernels.pooled import choose, part, tile_stats

        found, shapes = self.parts.get, dict(q_shape=self.q.shape, kv_shape=self.k.shape)
        tile_stats.launch_query_tiles(self.q, means=found("query_means"), squares=found("query_squares"))
        choose.launch_scores(q_means=found("query_means"), q_squares=found("query_squares"), keys=found("pooled_keys"),
                             k_var=found("key_spreads"), v_spread=found("value_spreads"), scores=found("scores"), **shapes,
                             sm_scale=self.options.scale)
        choose.launch_lists(scores=found("scores"), k_scale=found("k_scale"), tiles=found("listed"),
                            scale=found("listed_scale"), count=found("listed_count"), **shapes,
                            keep=self.options.pools.of_heads(self.q.shape[1]), always=self.options.pools.always)
        part.launch_pooled_part(self.q, self.out_operand, keys=found("pooled_keys"), values=found("pooled_values"),
                                bias=found("scores"), part_lse=found("pooled_lse"), kv_shape=self.k.shape,
                                sm_scale=self.options.scale)

    def attend(self) -> None:
        """Launches the attention kernel on what `quantise`, and `choose`, left."""
        more: dict[str, Any] = {} if self.config is None else {"config": self.config}
        q, k, v = self.q, self.k, self.v
        if not self.options.precision.exact:
            q, k, v = self.q_codes, self.k_codes, self.v_codes
            if self.options.pools:
                part, rows = self.parts.get, query_tile(q.shape[3])
                heavy = min(ceil_div(self.options.pools.always, rows), ceil_div(q.shape[2], rows))
                more.update(listed=Listed(part("listed"), part("listed_count"), part("listed_scale"), part("pooled_lse"), rows,
                                          heavy))
            more.update(bias=self.parts.get("bias"), lse_shift=self.parts.get("lse_shift"), pv_dtype=self._pv_dtype())
        lse = None if self.lse is None else Buffer(self.lse.data_ptr(), "float32", Origin("lse"))
        self.variant.load()(q, k, v, self.out_operand, sm_scale=self.options.scale, is_causal=self.options.is_causal,
                            packed=self.packed, lse=lse, arch=self.arch, **more)

    def _codes(self) -> tuple[Operand, Operand, Operand]:
        """Q's, K's and V's operands as the attention kernel takes them; V itself where P.V is in 16 bits."""
        precision, part, packed = self.options.precision, self.parts.get, self.packed is not None
        block = scale_block("k", precision.granularity)
        v = v_codes_of(self.v, part("v_codes"), part("v_scale"), packed) if precision.pv == "fp8" else self.v
        return (codes_of(self.q, precision.q, part("q_codes"), part("q_scale"), None, packed),
                codes_of(self.k, precision.k, part("k_codes"), part("k_scale"), block, packed), v)

    def _pv_dtype(self) -> str | None:
        """The 16-bit type of P and V: V's own; for float32 bfloat16, whose range holds any V, unless V is on the CPU.

        How large V is on a GPU could only be learnt by waiting for it.
        """
        if self.q.buffer.dtype != "float32" or self.options.precision.pv == "fp8":
            return None
        v = self.tensors[2]
        if not self.runtime.is_cpu(v):
            return "bfloat16"
        return "float16" if fits_float16(self.runtime.to_numpy(v)) else "bfloat16"


def _rows_contiguous(x: Any, runtime: Runtime) -> Any:
    """x itself if its last dimension is contiguous, else a contiguous copy."""
    strides = runtime.strides(x)
    return x if strides[-1] == 1 or runtime.shape(x)[-1] == 1 else runtime.contiguous(x)


def _operand(x: Any, name: str, runtime: Runtime, tensor_layout: str, packing: Packing | None = None) -> Operand:
    """A call's tensor as launchers take it, whatever its layout."""
    shape, strides, dtype = runtime.shape(x), runtime.strides(x), runtime.dtype_name(x)
    if packing is not None:
        (tokens, heads, head_dim), strides = shape, (0, strides[1], strides[0])
        shape = (packing.count(runtime), heads, tokens, head_dim)
    elif tensor_layout == "HND":
        strides = strides[:3]
    else:
        (batch, tokens, heads, head_dim), strides = shape, (strides[0], strides[2], strides[1])
        shape = (batch, heads, tokens, head_dim)
    return Operand(Buffer(x.data_ptr(), dtype, Origin(name)), tuple(shape), tuple(strides), FORMAT_OF_DTYPE[dtype])


def attend(variant: KernelVariant, request: Request, tensors: tuple[Any, Any, Any], options: AttentionOptions,
           packing: Packing | None, runtime: Runtime, key: tuple | None = None, steps: Steps | None = None
           ) -> tuple[Any, Any]:
    """(out, lse or None) of checked tensors by a selected variant. options.scale: a number.

    key: of `replay.key_of`; what is launched is kept as its plan. steps: as `Call`.
    """
    given = packing and packing.contiguous(runtime)
    call = Call(variant, options, *tensors, runtime=runtime, packing=given, steps=steps)
    with runtime.launch_guard(call.tensors[0]), recorded() as launches:
        call.quantise()
        call.choose()
        call.attend()
    copied = given is not packing or any(used is not one for used, one in zip(call.tensors, tensors))
    if key is not None and not copied:
        fresh = (call.out, call.lse, call.workspace)
        names = replay.TENSORS[:3 if packing is None else 5] + tuple(prologue.tensors_of(steps))
        replay.keep(key, replay.make(launches, variant, runtime, names, fresh))
    return call.out, call.lse


def run_quantize(x: Any, *, format: str, granularity: str, operand: str, smooth: bool, tensor_layout: str,
                 runtime: Runtime) -> dict[str, Any]:
    """Quantised copy of a GPU tensor: {"codes", "scale", "mean"} as tensors of its framework; mean is None unless smoothed.

    x: [B, N, H, D] or [B, H, N, D]. operand "q" or "k": codes [B, H, N, D / codes per byte], scale per row, or
    per 128 rows of k at granularity "block"; "v" (format "fp8"): codes
    [B, H, D, Npad], scale [B, H, D].
    """
    from lowbit_video.kernels.quant import quant_qk, quant_v, token_stats

    x = _rows_contiguous(x, runtime)
    given = _operand(x, "x", runtime, tensor_layout)
    block = scale_block(operand, granularity)
    made = dict(codes=("float8_e4m3fn", v_code_shape(given.shape)), scale=("float32", _channels(given.shape)), mean=None)
    if operand != "v":
        made = dict(codes=(get_format(format).storage, code_shape(given.shape, format)),
                    scale=("float32", scale_shape(given.shape, block)),
                    mean=("float32", _channels(given.shape)) if smooth else None)
    tensors = {name: part and runtime.empty(part[1], part[0], x) for name, part in made.items()}
    codes, scale, mean = (None if t is None else as_buffer(t) for t in tensors.values())
    partial = runtime.empty(partial_shape(given.shape), "float32", x) if smooth or operand == "v" else None
    with runtime.launch_guard(x):
        if operand == "v":
            token_stats.launch_stats(as_buffer(partial), v=given, v_scale=scale)
            quant_v.launch_quant_v(given, v_codes_of(given, codes, scale))
            return tensors
        if smooth:
            token_stats.launch_stats(as_buffer(partial), k=given, k_mean=mean)
        quant_qk.launch_quant_qk(given, codes_of(given, format, codes, scale, block), mean=mean)
    return tensors


def _channels(shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
    batch, heads, _, head_dim = shape
    return batch, heads, head_dim
